// The gradients of attention on any architecture since sm_80, for every shape with a head_dim up to 256: what the kernels made for one chip and shape do
// not take. Always deterministic.
#include "portable_backward_fma.cuh"
#include "portable_backward_mma.cuh"

using namespace portable;

template <typename T> static int backward_of_type(const Gradient &call, cudaStream_t stream) {
  const int head_dim = call.g.forward.head_dim;
  if (head_dim <= 32) return launch_backward_mma<T, 32, 64>(call, stream);
  if (head_dim <= 64) return launch_backward_mma<T, 64, 64>(call, stream);
  return launch_backward_mma<T, 128, 32>(call, stream);
}

static bool gradients_suit_matrix_units(const LcmAttentionGradient &g) {
  return suits_matrix_units(g.forward) && reinterpret_cast<uintptr_t>(g.dout) % 16 == 0 && (g.dq == nullptr || in_sixteens(g.dq, g.dq_row, g.dq_batch)) &&
         (g.dk == nullptr || (in_sixteens(g.dk, g.dk_row, g.dk_batch) && in_sixteens(g.dv, g.dv_row, g.dv_batch))) &&
         (g.dk2 == nullptr || (in_sixteens(g.dk2, g.dk2_row, g.dk2_batch) && in_sixteens(g.dv2, g.dv2_row, g.dv2_batch)));
}

// The row dots: one f32 a query and head.
extern "C" size_t lcm_attention_backward_portable_workspace(const LcmAttentionGradient *call) {
  const LcmAttention &a = call->forward;
  return static_cast<size_t>(a.batch) * a.heads * a.tokens * sizeof(float);
}

// -1: head_dim over 256, or a dtype that is none.
extern "C" int lcm_attention_backward_portable(const LcmAttentionGradient *call, cudaStream_t stream) {
  const LcmAttention &a = call->forward;
  if (!is_supported(a)) return -1;
  if (call->workspace_bytes < lcm_attention_backward_portable_workspace(call) || a.lse == nullptr) return cudaErrorInvalidValue;
  const Gradient gradient{*call, static_cast<float *>(call->workspace), call->dk != nullptr && call->dv != nullptr,
                          a.k2 != nullptr && call->dk2 != nullptr && call->dv2 != nullptr,
                          in_fours(a) && in_fours(call->dout, a.out_row, a.out_batch)};
  const int status = launch(row_dots, dim3(tiles_of(a.tokens, 8), a.heads, a.batch), dim3(32, 8), 0, gradient, stream);
  if (status != 0) return status;
  if (gradients_suit_matrix_units(*call))
    return a.dtype == BF16 ? backward_of_type<__nv_bfloat16>(gradient, stream) : backward_of_type<__half>(gradient, stream);
  return with_fma_tiles(a.head_dim, [&](auto tiles) { return launch_backward_fma<decltype(tiles)>(gradient, stream); });
}
