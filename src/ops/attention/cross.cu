// Cross-attention to text and image tokens (IP-Adapter, Ye et al. 2023): two softmaxes over the same queries, one kernel.
#include "cross.cuh"

namespace cross {

struct Forward {
  LcmAttention a; // k, v: text; k2, v2: image tokens
  float image_scale;
  float *lse_image;
};

template <int TEXT> constexpr int BLOCKS = TEXT > 5 ? 2 : 4; // at once on a multiprocessor, as far as registers go

// weights (16 x 16 GROUPS, packed) = factor * softmax of scale * scores, of which `count` columns are real; and the log-sum-exp of a thread's two rows.
template <typename T, int GROUPS>
__device__ __forceinline__ void softmax(uint32_t (&weights)[2 * GROUPS][2], float (&lse)[2], float (&scores)[2 * GROUPS][4], int count, float scale,
                                        float factor) {
#pragma unroll
  for (int n = 0; n < 2 * GROUPS; n++)
    if (n * 8 + 8 > count) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (n * 8 + threadIdx.x % 4 * 2 + e % 2 >= count) scores[n][e] = -INFINITY;
    }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float highest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * GROUPS; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    const float shift = highest * scale * mma::LOG2_E;
#pragma unroll
    for (int n = 0; n < 2 * GROUPS; n++)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) sum += scores[n][e] = mma::exp2_fast(scores[n][e] * (scale * mma::LOG2_E) - shift);
    sum = sum_of_row(sum);
    lse[half] = highest * scale + __logf(sum);
    const float share = factor / sum;
#pragma unroll
    for (int n = 0; n < 2 * GROUPS; n++) weights[n][half] = mma::pack<T>(scores[n][2 * half] * share, scores[n][2 * half + 1] * share);
  }
}

// One term of the output of 16 queries: sums += factor softmax(scale q k^T) v.
template <typename T, int GROUPS>
__device__ __forceinline__ void add_term(float (&sums)[D / 8][4], float (&lse)[2], const Operand &queries, const T *keys, const T *values, int count,
                                         float scale, float factor) {
  float scores[2 * GROUPS][4];
  uint32_t weights[2 * GROUPS][2];
  dot_keys<T, GROUPS>(scores, queries, keys);
  softmax<T, GROUPS>(weights, lse, scores, count, scale, factor);
  add_weighted<T, GROUPS>(sums, weights, values);
}

// out (batch, tokens, heads * 64) = softmax(scale q k^T) v + image_scale softmax(scale q k2^T) v2, with up to 16 TEXT and 16 IMAGE keys, and both
// log-sum-exps (batch, heads, tokens) where wanted. Grid: (shares of the queries, heads, batch). A block keeps the head's keys and values in shared memory;
// each of its 4 warps goes over tiles of 16 queries, all of whose scores fit its registers, while the next two tiles are on their way. Many warps beat few
// with more to do at once: tiles of 32 queries halve what is read of the keys, and were slower.
template <typename T, int TEXT, int IMAGE> __global__ void __launch_bounds__(THREADS, BLOCKS<TEXT>) forward(const __grid_constant__ Forward call) {
  constexpr int TEXT_SIZE = TEXT * 16 * STRIDE<D>, IMAGE_SIZE = IMAGE * 16 * STRIDE<D>, SLOTS = 4 * 32;
  const LcmAttention &a = call.a;
  extern __shared__ __align__(16) unsigned char shared[];
  const int head = blockIdx.y, sample = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = head * D;
  uint4 *ring = reinterpret_cast<uint4 *>(shared) + warp * STAGES * SLOTS;
  T *keys = reinterpret_cast<T *>(shared + WARPS * STAGES * SLOTS * sizeof(uint4)), *values = keys + TEXT_SIZE;
  T *image_keys = values + TEXT_SIZE, *image_values = image_keys + IMAGE_SIZE;

  lcm::wait_for_previous();
  // The keys go first: everything waits for them, and they would queue behind the queries of all blocks.
  const bool image = portable::sees_reference(a, sample);
  copy_keys<T, TEXT>(keys, a.k, sample * a.k_batch + column, a.k_row, a.own_tokens);
  copy_keys<T, TEXT>(values, a.v, sample * a.v_batch + column, a.v_row, a.own_tokens);
  if (image) {
    const int from = a.reference_batch == 1 ? 0 : sample;
    copy_keys<T, IMAGE>(image_keys, a.k2, from * a.k2_batch + column, a.k2_row, a.reference_tokens);
    copy_keys<T, IMAGE>(image_values, a.v2, from * a.v2_batch + column, a.v2_row, a.reference_tokens);
  }
  mma::commit();
  const Share share(a.tokens);
  const T *q = static_cast<const T *>(a.q) + sample * a.q_batch + column;
  T *out = static_cast<T *>(a.out) + sample * a.out_batch + column;
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
    const int tile = share.begin + warp + stage * WARPS;
    if (tile < share.end) copy_rows(ring + stage * SLOTS, q, a.q_row, tile * ROWS, a.tokens);
    mma::commit();
  }
  mma::wait<STAGES>();
  renumber<T, 2 * (TEXT + IMAGE)>(keys);
  __syncthreads();

  int stage = 0;
  for (int tile = share.begin + warp; tile < share.end; tile += WARPS) {
    mma::wait<STAGES - 1>();
    const Operand queries = read_rows(ring + stage * SLOTS);
    if (tile + STAGES * WARPS < share.end) copy_rows(ring + stage * SLOTS, q, a.q_row, (tile + STAGES * WARPS) * ROWS, a.tokens);
    mma::commit();
    stage = (stage + 1) % STAGES;

    float sums[D / 8][4] = {}, lse[2], lse_image[2] = {0.f, 0.f};
    add_term<T, TEXT>(sums, lse, queries, keys, values, a.own_tokens, a.scale, 1.f);
    if (image) add_term<T, IMAGE>(sums, lse_image, queries, image_keys, image_values, a.reference_tokens, a.scale, call.image_scale);
    write_rows(sums, out, a.out_row, tile * ROWS, a.tokens);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = tile * ROWS + lane / 4 + half * 8;
      const int64_t at = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + row;
      if (lane % 4 == 0 && row < a.tokens) {
        if (a.lse != nullptr) a.lse[at] = lse[half];
        if (call.lse_image != nullptr) call.lse_image[at] = lse_image[half];
      }
    }
  }
}

template <typename T, int TEXT, int IMAGE> int launch_forward(const Forward &call, cudaStream_t stream) {
  const LcmAttention &a = call.a;
  const size_t shared = WARPS * STAGES * 4 * 32 * sizeof(uint4) + 2 * 16 * (TEXT + IMAGE) * STRIDE<D> * sizeof(T);
  return portable::launch(forward<T, TEXT, IMAGE>, dim3(shares(a, BLOCKS<TEXT>), a.heads, a.batch), THREADS, shared, call, stream, true);
}

// The instance made for SDXL, or the one for any numbers of keys.
template <typename T> int launch_forward(const Forward &call, cudaStream_t stream) {
  return is_small(call.a) ? launch_forward<T, 5, 1>(call, stream) : launch_forward<T, 8, 8>(call, stream);
}

} // namespace cross

// `call`'s k2, v2 are the image tokens' keys and values; lse (of the text) and lse_image may be null. -1: not head_dim 64, not 16-bit, more than 128 keys of a
// kind, or rows that do not start at a multiple of 16 bytes.
extern "C" int lcm_cross_attention_forward(const LcmAttention *call, float image_scale, float *lse_image, cudaStream_t stream) {
  using namespace cross;
  const LcmAttention &a = *call;
  if (!cross::is_supported(a)) return -1;
  const Forward argument{a, image_scale, lse_image};
  return a.dtype == portable::BF16 ? launch_forward<__nv_bfloat16>(argument, stream) : launch_forward<__half>(argument, stream);
}
