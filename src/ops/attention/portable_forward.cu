// Attention on any architecture since sm_80, for every shape with a head_dim up to 256: what the kernels made for one chip and shape do not take.
#include "portable_forward_fma.cuh"
#include "portable_forward_mma.cuh"

using namespace portable;

template <typename T> static int forward_of_type(const LcmAttention &a, cudaStream_t stream) {
  if (a.head_dim <= 32) return launch_forward_mma<T, 32>(a, stream);
  if (a.head_dim <= 64) return launch_forward_mma<T, 64>(a, stream);
  if (a.head_dim <= 96) return launch_forward_mma<T, 96>(a, stream); // 80: the vision encoder of IP-Adapter
  return launch_forward_mma<T, 128>(a, stream);
}

// -1: head_dim over 256, or a dtype that is none.
extern "C" int lcm_attention_forward_portable(const LcmAttention *call, cudaStream_t stream) {
  const LcmAttention &a = *call;
  if (!is_supported(a)) return -1;
  if (suits_matrix_units(a)) return a.dtype == BF16 ? forward_of_type<__nv_bfloat16>(a, stream) : forward_of_type<__half>(a, stream);
  return with_fma_tiles(a.head_dim, [&](auto tiles) { return launch_forward_fma<decltype(tiles)>(a, stream); });
}
