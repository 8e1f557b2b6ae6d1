#pragma once
// Attention of 16-bit tensors on the matrix units of any architecture since sm_80, after FlashAttention-2 (Dao 2023).
#include "portable_mma.cuh"

namespace portable {

// out (batch, tokens, heads * head_dim) = softmax(scale q [k; k2]^T) [v; v2], and the log-sum-exp of its scores.
// Grid: (tiles of 64 queries, heads, batch). Each of the 4 warps keeps 16 queries' operands, running maxima, sums and outputs in registers and goes over
// the keys 64 at a time, own ones first; the copy of the next tile of keys runs beside the arithmetic of this one. Sums and softmax in f32, the weights
// rounded to T before they meet the values.
template <typename T, int D> __global__ void __launch_bounds__(THREADS) forward_mma(const __grid_constant__ LcmAttention a) {
  constexpr int TILE = 64, SIZE = TILE * STRIDE<D>;
  extern __shared__ __align__(16) unsigned char shared[];
  T *queries = reinterpret_cast<T *>(shared), *keys = queries + SIZE, *values = keys + 2 * SIZE;

  const int head = blockIdx.y, sample = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_query = blockIdx.x * TILE, row = first_query + warp * 16 + lane / 4;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const VisibleTiles tiles(a, TILE, min(first_query + TILE, a.tokens) - 1, sample);

  auto copy_keys = [&](int i) {
    const Keys s = keys_of_tile(a, tiles.index(i), TILE, sample, head);
    copy_tile<T, TILE, D>(keys + i % 2 * SIZE, s.k, s.k_offset, s.k_row, s.first, s.rows, a.head_dim);
    copy_tile<T, TILE, D>(values + i % 2 * SIZE, s.v, s.v_offset, s.v_row, s.first, s.rows, a.head_dim);
  };
  copy_tile<T, TILE, D>(queries, a.q, sample * a.q_batch + column, a.q_row, first_query, a.tokens, a.head_dim);
  if (tiles.all > 0) copy_keys(0);
  mma::commit();

  const float scale = a.scale * mma::LOG2_E;
  float out[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  T *own_queries = queries + warp * 16 * STRIDE<D>;
  for (int i = 0; i < tiles.all; i++) {
    if (i + 1 < tiles.all) copy_keys(i + 1);
    mma::commit();
    mma::wait<1>();
    __syncthreads();

    float scores[TILE / 8][4];
    dot_rows<T, TILE, D>(scores, own_queries, keys + i % 2 * SIZE);
    const Keys s = keys_of_tile(a, tiles.index(i), TILE, sample, head);
    const bool causal = a.causal && s.own && s.first + TILE > first_query;
    if (s.first + TILE > s.rows || causal) {
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int key = s.first + n * 8 + lane % 4 * 2 + e % 2;
          if (key >= s.rows || (causal && key > row + e / 2 * 8)) scores[n][e] = -INFINITY;
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float highest = maximum[half];
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      const float shift = highest == -INFINITY ? 0.f : highest * scale;
      const float shrink = mma::exp2_fast(maximum[half] * scale - shift);
      maximum[half] = highest;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) sum[half] += scores[n][e] = mma::exp2_fast(scores[n][e] * scale - shift);
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) out[n][e] *= shrink;
    }
    add_weighted<T, TILE, D>(out, scores, values + i % 2 * SIZE);
    __syncthreads();
  }
  mma::wait<0>();
  __syncthreads(); // without a single key the copy of the queries is what was waited for

#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    if (a.lse != nullptr && lane % 4 == 0 && row + half * 8 < a.tokens)
      a.lse[(static_cast<int64_t>(sample) * a.heads + head) * a.tokens + row + half * 8] = maximum[half] * a.scale + logf(sum[half]);
  }
  store_rows<T, D>(out, sum[0] > 0.f ? 1.f / sum[0] : 0.f, sum[1] > 0.f ? 1.f / sum[1] : 0.f, own_queries, a.out, sample * a.out_batch + column, a.out_row,
                   first_query + warp * 16, a.tokens, a.head_dim);
}

template <typename T, int D> int launch_forward_mma(const LcmAttention &a, cudaStream_t stream) {
  return launch(forward_mma<T, D>, dim3(tiles_of(a.tokens, 64), a.heads, a.batch), THREADS, 5 * 64 * STRIDE<D> * sizeof(T), a, stream);
}

} // namespace portable
