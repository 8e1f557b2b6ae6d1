// Backward pass of extended attention on Hopper: head_dim 64, no causal mask, bf16 or f16. Keys and values come from two places (own and reference), each read
// and its gradients written where they are.
//
// By default three launches, each beginning while the one before it ends: `prepare` (D = rowsum(dout * out), clears sums), `key_gradients` (dk, dv of both sources
// and dq as f32 atomic sums), `round_dq`.
// That is five products per tile of scores. The deterministic mode, and calls that want the gradients of few keys, take dq from `query_gradients` instead:
// three products, next to four in `key_gradients` for the keys whose gradients are wanted, if any.
#include <cudaTypedefs.h>

#include "hopper_backward_keys.cuh"
#include "hopper_backward_queries.cuh"
#include "hopper_backward_rows.cuh"

namespace lcm::backward {

struct Device { bool hopper; int multiprocessors; PFN_cuTensorMapEncodeTiled_v12000 encode; };

// Of the current device when first asked; threads that ask at once find the same.
static const Device &device() {
  static Device known;
  static int ready;
  if (__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) return known;
  int id = 0, major = 0, minor = 0, multiprocessors = 0;
  cudaDriverEntryPointQueryResult result;
  void *encode = nullptr;
  if (!cudaGetDevice(&id) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id) && !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id) &&
      !cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id) &&
      !cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &result) && encode) {
    known.encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode);
    known.multiprocessors = multiprocessors;
    known.hopper = major == 9 && minor == 0;
  }
  __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
  return known;
}

static int tiles(int tokens) { return (tokens + kTile - 1) / kTile; }

// Which kernels a call takes.
struct Plan {
  bool own, reference, fused, dq_alone; // gradients of own keys wanted, of reference keys; dq in the key kernel, in the query kernel
  explicit Plan(const LcmAttentionGradient &a) {
    const LcmAttention &f = a.forward;
    const int64_t r = f.k2 ? f.reference_tokens : 0;
    own = a.dk, reference = a.dk2 && r;
    const int64_t wanted = (own ? f.own_tokens : 0) + (reference ? r : 0);
    // In units of products times keys: 5 * all against 3 * all + 4 * wanted.
    fused = a.dq && !a.deterministic && 4 * wanted > 2 * (f.own_tokens + r);
    dq_alone = a.dq && !fused;
  }
};

static bool aligned(const void *p, int64_t row, int64_t batch) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row % 8 == 0 && batch % 8 == 0; }

static bool takes(const LcmAttentionGradient &a) {
  const LcmAttention &f = a.forward;
  if ((f.dtype != 1 && f.dtype != 2) || f.head_dim != kDim || f.causal || f.batch < 1 || f.heads < 1 || f.tokens < 1 || f.own_tokens < 1 || !f.lse || !f.out || !a.dout) return false;
  if (f.batch > 65535 || (int64_t)f.batch * f.heads > 65535 || !a.dk != !a.dv || !a.dk2 != !a.dv2) return false;
  if (!f.k2 != !f.v2 || !f.q || !f.k || !f.v) return false;
  if (f.k2 && (f.reference_tokens < 1 || (f.reference_batch != 1 && f.reference_batch != f.batch))) return false;
  if (!f.k2 && a.dk2) return false;
  return aligned(f.q, f.q_row, f.q_batch) && aligned(f.k, f.k_row, f.k_batch) && aligned(f.v, f.v_row, f.v_batch) && aligned(f.k2, f.k2_row, f.k2_batch) && aligned(f.v2, f.v2_row, f.v2_batch) &&
         aligned(f.out, f.out_row, f.out_batch) && aligned(a.dout, f.out_row, f.out_batch) && aligned(a.dq, a.dq_row, a.dq_batch) && aligned(a.dk, a.dk_row, a.dk_batch) &&
         aligned(a.dv, a.dv_row, a.dv_batch) && aligned(a.dk2, a.dk2_row, a.dk2_batch) && aligned(a.dv2, a.dv2_row, a.dv2_batch);
}

static bool encode(CUtensorMap *map, int dtype, const void *data, int heads, int tokens, int batch, int64_t row, int64_t sample) {
  const cuuint64_t size[4] = {kDim, (cuuint64_t)heads, (cuuint64_t)tokens, (cuuint64_t)batch};
  const cuuint64_t stride[3] = {kDim * 2, (cuuint64_t)row * 2, (cuuint64_t)(batch > 1 ? sample : row * tokens) * 2};
  const cuuint32_t box[4] = {kDim, 1, kTile, 1}, steps[4] = {1, 1, 1, 1};
  return device().encode(map, dtype == 1 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void *>(data), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                         CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Launches a kernel that may begin while the one before it ends.
template <class... Parameters> static int launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, cudaStream_t stream, const Parameters &...parameters) {
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)) return e;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = &early, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

template <class T> static int run(const LcmAttentionGradient &a, const Plan &plan, const Maps &maps, Arguments p, cudaStream_t stream) {
  const LcmAttention &f = a.forward;
  const dim3 rows(p.query_tiles, f.batch * f.heads);
  if (const int e = launch(prepare<T>, rows, 256, 0, stream, p, static_cast<const T *>(f.out), static_cast<const T *>(a.dout), static_cast<const float *>(f.lse), f.out_row, f.out_batch)) return e;
  const int own = tiles(f.own_tokens), reference = f.k2 ? tiles(f.reference_tokens) : 0;
  const auto blocks = [](int items) { return dim3(items < device().multiprocessors ? items : device().multiprocessors); };
  const int key_tiles = plan.own || plan.fused ? own : 0, reference_key_tiles = plan.reference || plan.fused ? reference : 0;
  p.keys_follow = key_tiles || reference_key_tiles;
  if (plan.dq_alone) {
    p.own_tiles = own, p.reference_tiles = reference, p.items = p.query_tiles * f.heads * f.batch;
    if (const int e = launch(query_gradients<T>, blocks(p.items), kThreads, sizeof(QueryMemory), stream, maps, p)) return e;
    p.after_queries = 1;
  }
  p.own_tiles = key_tiles, p.reference_tiles = reference_key_tiles;
  p.reference_items = p.reference_tiles ? p.reference_tiles * f.heads * f.reference_batch : 0;
  p.items = p.reference_items + p.own_tiles * f.heads * f.batch;
  if (!p.items) return 0;
  if (!plan.fused) return launch(key_gradients<T, false>, blocks(p.items), kThreads, sizeof(KeyMemory), stream, maps, p);
  if (const int e = launch(key_gradients<T, true>, blocks(p.items), kThreads, sizeof(KeyMemory), stream, maps, p)) return e;
  return launch(round_dq<T>, rows, 256, 0, stream, p);
}

} // namespace lcm::backward

using namespace lcm::backward;

// Bytes of scratch memory that the call needs: statistics of the queries, and where dq is summed in f32, that sum.
extern "C" size_t lcm_attention_backward_hopper_workspace(const LcmAttentionGradient *args) {
  const size_t blocks = (size_t)tiles(args->forward.tokens) * args->forward.heads * args->forward.batch;
  return 256 + blocks * kStatisticsBytes + (Plan(*args).fused ? blocks * kTile * kDim * 4 : 0);
}

// Returns 0, a cudaError_t, or -1 where another kernel must take the call: another head_dim, dtype or device, a causal mask, rows not in multiples of 16 bytes,
// or too little workspace. Nothing wanted is nothing done.
extern "C" int lcm_attention_backward_hopper(const LcmAttentionGradient *args, cudaStream_t stream) {
  const LcmAttentionGradient &a = *args;
  const LcmAttention &f = a.forward;
  if (!device().hopper || !takes(a)) return -1;
  if (!a.workspace || a.workspace_bytes < lcm_attention_backward_hopper_workspace(args) || reinterpret_cast<uintptr_t>(a.workspace) % 128) return -1;
  if (!a.dq && !a.dk && !a.dk2) return 0;
  const Plan plan(a);
  const size_t blocks = (size_t)tiles(f.tokens) * f.heads * f.batch;
  uint8_t *workspace = static_cast<uint8_t *>(a.workspace);
  Arguments p = {};
  p.next_item = reinterpret_cast<int *>(workspace);
  p.statistics = reinterpret_cast<float *>(workspace + 256);
  if (plan.fused) p.dq_sum = reinterpret_cast<float *>(workspace + 256 + blocks * kStatisticsBytes);
  p.use_reference = f.use_reference;
  p.dq = {a.dq, a.dq_row, a.dq_batch};
  p.dk = {a.dk, a.dk_row, a.dk_batch};
  p.dv = {a.dv, a.dv_row, a.dv_batch};
  p.dk2 = {a.dk2, a.dk2_row, a.dk2_batch};
  p.dv2 = {a.dv2, a.dv2_row, a.dv2_batch};
  p.batch = f.batch, p.heads = f.heads, p.tokens = f.tokens, p.own_tokens = f.own_tokens, p.reference_tokens = f.k2 ? f.reference_tokens : 0, p.reference_batch = f.reference_batch;
  p.query_tiles = tiles(f.tokens);
  p.scale = f.scale;
  Maps maps = {};
  bool encoded = encode(&maps.q, f.dtype, f.q, f.heads, f.tokens, f.batch, f.q_row, f.q_batch) && encode(&maps.dout, f.dtype, a.dout, f.heads, f.tokens, f.batch, f.out_row, f.out_batch) &&
                 encode(&maps.k, f.dtype, f.k, f.heads, f.own_tokens, f.batch, f.k_row, f.k_batch) && encode(&maps.v, f.dtype, f.v, f.heads, f.own_tokens, f.batch, f.v_row, f.v_batch);
  if (f.k2)
    encoded = encoded && encode(&maps.k2, f.dtype, f.k2, f.heads, f.reference_tokens, f.reference_batch, f.k2_row, f.k2_batch) &&
              encode(&maps.v2, f.dtype, f.v2, f.heads, f.reference_tokens, f.reference_batch, f.v2_row, f.v2_batch);
  if (!encoded) return -1;
  return f.dtype == 1 ? run<__nv_bfloat16>(a, plan, maps, p, stream) : run<__half>(a, plan, maps, p, stream);
}
