#pragma once
// Attention in f32 arithmetic: f32 tensors, and whatever the matrix units' kernels do not take.
#include "fma.cuh"

namespace portable {

struct ForwardFma {
  LcmAttention a;
  bool in_fours;
};

// out (batch, tokens, heads * head_dim) = softmax(scale q [k; k2]^T) [v; v2], and the log-sum-exp of its scores.
// Grid: (tiles of queries, heads, batch). One pass over the keys with running maxima and sums; the values of a tile arrive while its scores are made, the
// next tile's keys while the values are added.
template <typename F> __global__ void __launch_bounds__(SIDE *SIDE, F::C <= 2 ? 3 : 2) forward_fma(const __grid_constant__ ForwardFma call) {
  constexpr int R = F::R, C = F::C;
  const LcmAttention &a = call.a;
  extern __shared__ __align__(16) float tile_memory[];
  float *queries = tile_memory, *keys = queries + F::TILE_SIZE, *values = keys + F::TILE_SIZE, *scratch = values + F::TILE_SIZE;

  const int head = blockIdx.y, sample = blockIdx.z, first_query = blockIdx.x * F::ROWS;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const VisibleTiles tiles(a, F::ROWS, min(first_query + F::ROWS, a.tokens) - 1, sample);
  auto keys_of = [&](int i) { return keys_of_tile(a, tiles.index(i), F::ROWS, sample, head); };
  auto copy_keys = [&](const Keys &s) {
    F::copy_tile(keys, s.k, s.k_offset, s.k_row, s.first, s.rows, a.head_dim, a.dtype, call.in_fours);
    mma::commit();
  };
  F::copy_tile(queries, a.q, sample * a.q_batch + column, a.q_row, first_query, a.tokens, a.head_dim, a.dtype, call.in_fours);
  if (tiles.all > 0) copy_keys(keys_of(0));

  float out[R][C] = {}, shift[R], sum[R]; // shift: the highest score so far, scaled
#pragma unroll
  for (int i = 0; i < R; i++) shift[i] = -INFINITY, sum[i] = 0.f;
  for (int tile = 0; tile < tiles.all; tile++) {
    const Keys s = keys_of(tile);
    mma::wait<0>();
    __syncthreads();
    F::copy_tile(values, s.v, s.v_offset, s.v_row, s.first, s.rows, a.head_dim, a.dtype, call.in_fours);
    mma::commit();
    float weights[R][R];
    F::dot_rows(weights, queries, keys);

#pragma unroll
    for (int i = 0; i < R; i++) {
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int key = s.first + threadIdx.x + SIDE * j;
        if (key >= s.rows || (a.causal && s.own && key > first_query + F::row(i))) weights[i][j] = -INFINITY;
        highest = fmaxf(highest, weights[i][j]);
      }
#pragma unroll
      for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, lanes));
      highest = fmaxf(shift[i], highest * a.scale);
      const float base = highest == -INFINITY ? 0.f : highest, shrink = F::exponential(shift[i] - base);
      shift[i] = highest;
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < R; j++) sum[i] += weights[i][j] = F::exponential(fmaf(weights[i][j], a.scale, -base));
#pragma unroll
      for (int c = 0; c < C; c++) out[i][c] *= shrink;
    }
    mma::wait<0>();
    __syncthreads();
    if (tile + 1 < tiles.all) copy_keys(keys_of(tile + 1));
    F::add_weighted(out, weights, values, scratch);
  }

#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int lanes = SIDE / 2; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], lanes);
    const int query = first_query + F::row(i);
    if (a.lse != nullptr && threadIdx.x == 0 && query < a.tokens)
      a.lse[(static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query] = shift[i] + logf(sum[i]);
    sum[i] = sum[i] > 0.f ? 1.f / sum[i] : 0.f;
  }
  F::store_tile(out, sum, a.out, sample * a.out_batch + column, a.out_row, first_query, a.tokens, a.head_dim, a.dtype);
}

template <typename F> int launch_forward_fma(const LcmAttention &a, cudaStream_t stream) {
  const size_t shared = (3 * F::TILE_SIZE + F::WEIGHTS_SIZE) * sizeof(float);
  return launch(forward_fma<F>, dim3(tiles_of(a.tokens, F::ROWS), a.heads, a.batch), dim3(SIDE, SIDE), shared,
                ForwardFma{a, in_fours(a)}, stream);
}

} // namespace portable
