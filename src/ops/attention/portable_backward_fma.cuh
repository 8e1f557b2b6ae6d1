#pragma once
// The gradients of attention in f32 arithmetic: f32 tensors, and whatever the matrix units' kernels do not take. As there, queries' and keys' gradients
// come from two kernels, and every sum has one owner.
#include "fma.cuh"
#include "portable_gradient.cuh"

namespace portable {

// dk, dv of a tile of keys: with the weights p = exp(scale q k^T - lse), dv = p^T dout and dk = scale (p * (dout v^T - row dot))^T q.
// Grid: (tiles of keys, heads, batch). Keys are the products' rows.
template <typename F> __global__ void __launch_bounds__(SIDE *SIDE, F::C <= 4 ? 2 : 1) key_gradients_fma(const __grid_constant__ Gradient call) {
  constexpr int R = F::R, C = F::C;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) float tile_memory[];
  float *keys = tile_memory, *values = keys + F::TILE_SIZE, *queries = values + F::TILE_SIZE, *douts = queries + F::STAGES * F::TILE_SIZE,
        *scratch = douts + F::STAGES * F::TILE_SIZE;

  const int head = blockIdx.y;
  const KeyGradient to = key_gradient(call, blockIdx.x, F::ROWS, blockIdx.z, head);
  if (to.samples == 0) return;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const bool causal = a.causal && to.keys.own;
  const int first_step = causal ? blockIdx.x : 0, steps = max(tiles_of(a.tokens, F::ROWS) - first_step, 0), all = steps * to.samples;
  auto copy = [&](float *tile, const void *matrix, int64_t offset, int64_t row_stride, int first, int rows) {
    F::copy_tile(tile, matrix, offset, row_stride, first, rows, a.head_dim, a.dtype, call.in_fours);
  };
  auto copy_queries = [&](int i) {
    const int sample = to.sample + i / steps, first = (first_step + i % steps) * F::ROWS, at = i % F::STAGES * F::TILE_SIZE;
    copy(queries + at, a.q, sample * a.q_batch + column, a.q_row, first, a.tokens);
    copy(douts + at, call.g.dout, sample * a.out_batch + column, a.out_row, first, a.tokens);
  };
  copy(keys, to.keys.k, to.keys.k_offset, to.keys.k_row, to.keys.first, to.keys.rows);
  copy(values, to.keys.v, to.keys.v_offset, to.keys.v_row, to.keys.first, to.keys.rows);
  if (all > 0) copy_queries(0);
  mma::commit();

  float dk[R][C] = {}, dv[R][C] = {};
  for (int i = 0; i < all; i++) {
    const int sample = to.sample + i / steps, first = (first_step + i % steps) * F::ROWS, at = i % F::STAGES * F::TILE_SIZE;
    // Queries past the end, and those of a sample that does not see the reference, get an infinite lse: their weights are zero.
    const bool visible = to.keys.own || sees_reference(a, sample);
    float lse[R], dot[R];
#pragma unroll
    for (int j = 0; j < R; j++) {
      const int query = first + threadIdx.x + SIDE * j;
      const int64_t row = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query;
      lse[j] = visible && query < a.tokens ? a.lse[row] : INFINITY;
      dot[j] = visible && query < a.tokens ? call.row_dots[row] : 0.f;
    }
    if (F::STAGES == 2 && i + 1 < all) copy_queries(i + 1);
    mma::commit();
    mma::wait<F::STAGES - 1>();
    __syncthreads();

    float weights[R][R], slopes[R][R];
    F::dot_rows(weights, keys, queries + at);
    F::dot_rows(slopes, values, douts + at);
#pragma unroll
    for (int k = 0; k < R; k++)
#pragma unroll
      for (int j = 0; j < R; j++) {
        weights[k][j] = F::exponential(fmaf(weights[k][j], a.scale, -lse[j]));
        if (causal && to.keys.first + F::row(k) > first + threadIdx.x + SIDE * j) weights[k][j] = 0.f;
        slopes[k][j] = weights[k][j] * (slopes[k][j] - dot[j]);
      }
    F::add_weighted(dv, weights, douts + at, scratch);
    F::add_weighted(dk, slopes, queries + at, scratch);
    __syncthreads();
    if (F::STAGES == 1 && i + 1 < all) copy_queries(i + 1);
  }
  float scale[R], one[R];
#pragma unroll
  for (int i = 0; i < R; i++) scale[i] = a.scale, one[i] = 1.f;
  F::store_tile(dk, scale, to.dk, to.dk_offset, to.dk_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);
  F::store_tile(dv, one, to.dv, to.dv_offset, to.dv_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);
}

// dq = scale (p * (dout [v; v2]^T - row dot)) [k; k2]. Grid: (tiles of queries, heads, batch).
template <typename F> __global__ void __launch_bounds__(SIDE *SIDE, F::C <= 4 ? 2 : 1) query_gradients_fma(const __grid_constant__ Gradient call) {
  constexpr int R = F::R, C = F::C;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) float tile_memory[];
  float *queries = tile_memory, *douts = queries + F::TILE_SIZE, *keys = douts + F::TILE_SIZE, *values = keys + F::STAGES * F::TILE_SIZE,
        *scratch = values + F::STAGES * F::TILE_SIZE;

  const int head = blockIdx.y, sample = blockIdx.z, first_query = blockIdx.x * F::ROWS;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const VisibleTiles tiles(a, F::ROWS, min(first_query + F::ROWS, a.tokens) - 1, sample);
  auto copy = [&](float *tile, const void *matrix, int64_t offset, int64_t row_stride, int first, int rows) {
    F::copy_tile(tile, matrix, offset, row_stride, first, rows, a.head_dim, a.dtype, call.in_fours);
  };
  auto copy_keys = [&](int i) {
    const Keys s = keys_of_tile(a, tiles.index(i), F::ROWS, sample, head);
    copy(keys + i % F::STAGES * F::TILE_SIZE, s.k, s.k_offset, s.k_row, s.first, s.rows);
    copy(values + i % F::STAGES * F::TILE_SIZE, s.v, s.v_offset, s.v_row, s.first, s.rows);
  };
  copy(queries, a.q, sample * a.q_batch + column, a.q_row, first_query, a.tokens);
  copy(douts, call.g.dout, sample * a.out_batch + column, a.out_row, first_query, a.tokens);
  if (tiles.all > 0) copy_keys(0);
  mma::commit();

  float dq[R][C] = {}, lse[R], dot[R], scale[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int query = first_query + F::row(i);
    const int64_t row = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query;
    lse[i] = query < a.tokens ? a.lse[row] : INFINITY;
    dot[i] = query < a.tokens ? call.row_dots[row] : 0.f;
    scale[i] = a.scale;
  }
  for (int tile = 0; tile < tiles.all; tile++) {
    const Keys s = keys_of_tile(a, tiles.index(tile), F::ROWS, sample, head);
    const int at = tile % F::STAGES * F::TILE_SIZE;
    if (F::STAGES == 2 && tile + 1 < tiles.all) copy_keys(tile + 1);
    mma::commit();
    mma::wait<F::STAGES - 1>();
    __syncthreads();

    float weights[R][R], slopes[R][R];
    F::dot_rows(weights, queries, keys + at);
    F::dot_rows(slopes, douts, values + at);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int key = s.first + threadIdx.x + SIDE * j;
        const bool visible = key < s.rows && !(a.causal && s.own && key > first_query + F::row(i));
        slopes[i][j] = visible ? F::exponential(fmaf(weights[i][j], a.scale, -lse[i])) * (slopes[i][j] - dot[i]) : 0.f;
      }
    F::add_weighted(dq, slopes, keys + at, scratch);
    __syncthreads();
    if (F::STAGES == 1 && tile + 1 < tiles.all) copy_keys(tile + 1);
  }
  F::store_tile(dq, scale, call.g.dq, sample * call.g.dq_batch + column, call.g.dq_row, first_query, a.tokens, a.head_dim, a.dtype);
}

template <typename F> int launch_backward_fma(const Gradient &call, cudaStream_t stream) {
  const LcmAttention &a = call.g.forward;
  const size_t shared = ((2 + 2 * F::STAGES) * F::TILE_SIZE + F::WEIGHTS_SIZE) * sizeof(float);
  int status = launch(key_gradients_fma<F>, dim3(key_blocks(call, F::ROWS), a.heads, a.batch), dim3(SIDE, SIDE), shared, call, stream);
  if (status == 0 && call.g.dq != nullptr)
    status = launch(query_gradients_fma<F>, dim3(tiles_of(a.tokens, F::ROWS), a.heads, a.batch), dim3(SIDE, SIDE), shared, call, stream);
  return status;
}

} // namespace portable
