#pragma once
// The gradients of attention in f32 arithmetic: f32 tensors, and whatever the matrix units' kernels do not take. As there, queries' and keys' gradients
// come from two kernels, and every sum has one owner.
#include "fma.cuh"
#include "portable_gradient.cuh"

namespace portable {

// dk, dv of a tile of keys: with the weights p = exp(scale q k^T - lse), dv = p^T dout and dk = scale (p * (dout v^T - row dot))^T q.
// Grid: (tiles of keys, heads, batch). Keys are the products' rows.
template <typename F> __global__ void __launch_bounds__(SIDE *SIDE) key_gradients_fma(const __grid_constant__ Gradient call) {
  constexpr int R = F::R, C = F::C;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) float tile_memory[];
  float *keys = tile_memory, *values = keys + F::TILE_SIZE, *queries = values + F::TILE_SIZE, *douts = queries + F::TILE_SIZE, *scratch = douts + F::TILE_SIZE;

  const int head = blockIdx.y;
  const KeyGradient to = key_gradient(call, blockIdx.x, F::ROWS, blockIdx.z, head);
  if (to.samples == 0) return;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const bool causal = a.causal && to.keys.own;
  F::load_tile(keys, to.keys.k, to.keys.k_offset, to.keys.k_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);
  F::load_tile(values, to.keys.v, to.keys.v_offset, to.keys.v_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);

  float dk[R][C] = {}, dv[R][C] = {};
  for (int sample = to.sample; sample < to.sample + to.samples; sample++) {
    if (!to.keys.own && !sees_reference(a, sample)) continue;
    for (int first = causal ? to.keys.first : 0; first < a.tokens; first += F::ROWS) {
      __syncthreads();
      F::load_tile(queries, a.q, sample * a.q_batch + column, a.q_row, first, a.tokens, a.head_dim, a.dtype);
      F::load_tile(douts, call.g.dout, sample * a.out_batch + column, a.out_row, first, a.tokens, a.head_dim, a.dtype);
      __syncthreads();
      float weights[R][R], slopes[R][R];
      F::dot_rows(weights, keys, queries);
      F::dot_rows(slopes, values, douts);
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int query = first + threadIdx.x + SIDE * j;
        const int64_t at = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query;
        const float lse = query < a.tokens ? a.lse[at] : INFINITY, dot = query < a.tokens ? call.row_dots[at] : 0.f;
#pragma unroll
        for (int i = 0; i < R; i++) {
          const bool visible = !causal || to.keys.first + F::row(i) <= query;
          weights[i][j] = visible ? expf(weights[i][j] * a.scale - lse) : 0.f;
          slopes[i][j] = weights[i][j] * (slopes[i][j] - dot);
        }
      }
      F::add_weighted(dv, weights, douts, scratch);
      F::add_weighted(dk, slopes, queries, scratch);
    }
  }
  float scale[R], one[R];
#pragma unroll
  for (int i = 0; i < R; i++) scale[i] = a.scale, one[i] = 1.f;
  F::store_tile(dk, scale, to.dk, to.dk_offset, to.dk_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);
  F::store_tile(dv, one, to.dv, to.dv_offset, to.dv_row, to.keys.first, to.keys.rows, a.head_dim, a.dtype);
}

// dq = scale (p * (dout [v; v2]^T - row dot)) [k; k2]. Grid: (tiles of queries, heads, batch).
template <typename F> __global__ void __launch_bounds__(SIDE *SIDE) query_gradients_fma(const __grid_constant__ Gradient call) {
  constexpr int R = F::R, C = F::C;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) float tile_memory[];
  float *keys = tile_memory, *values = keys + F::TILE_SIZE, *queries = values + F::TILE_SIZE, *douts = queries + F::TILE_SIZE, *scratch = douts + F::TILE_SIZE;

  const int head = blockIdx.y, sample = blockIdx.z, first_query = blockIdx.x * F::ROWS;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const VisibleTiles tiles(a, F::ROWS, min(first_query + F::ROWS, a.tokens) - 1, sample);
  F::load_tile(queries, a.q, sample * a.q_batch + column, a.q_row, first_query, a.tokens, a.head_dim, a.dtype);
  F::load_tile(douts, call.g.dout, sample * a.out_batch + column, a.out_row, first_query, a.tokens, a.head_dim, a.dtype);

  float dq[R][C] = {}, lse[R], dot[R], scale[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int query = first_query + F::row(i);
    const int64_t at = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query;
    lse[i] = query < a.tokens ? a.lse[at] : INFINITY;
    dot[i] = query < a.tokens ? call.row_dots[at] : 0.f;
    scale[i] = a.scale;
  }
  for (int tile = 0; tile < tiles.all; tile++) {
    const Keys s = keys_of_tile(a, tiles.index(tile), F::ROWS, sample, head);
    __syncthreads();
    F::load_tile(keys, s.k, s.k_offset, s.k_row, s.first, s.rows, a.head_dim, a.dtype);
    F::load_tile(values, s.v, s.v_offset, s.v_row, s.first, s.rows, a.head_dim, a.dtype);
    __syncthreads();
    float weights[R][R], slopes[R][R];
    F::dot_rows(weights, queries, keys);
    F::dot_rows(slopes, douts, values);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int key = s.first + threadIdx.x + SIDE * j;
        const bool visible = key < s.rows && !(a.causal && s.own && key > first_query + F::row(i));
        slopes[i][j] = visible ? expf(weights[i][j] * a.scale - lse[i]) * (slopes[i][j] - dot[i]) : 0.f;
      }
    F::add_weighted(dq, slopes, keys, scratch);
  }
  F::store_tile(dq, scale, call.g.dq, sample * call.g.dq_batch + column, call.g.dq_row, first_query, a.tokens, a.head_dim, a.dtype);
}

template <typename F> int launch_backward_fma(const Gradient &call, cudaStream_t stream) {
  const LcmAttention &a = call.g.forward;
  const size_t shared = (4 * F::TILE_SIZE + F::WEIGHTS_SIZE) * sizeof(float);
  int status = launch(key_gradients_fma<F>, dim3(key_blocks(call, F::ROWS), a.heads, a.batch), dim3(SIDE, SIDE), shared, call, stream);
  if (status == 0 && call.g.dq != nullptr)
    status = launch(query_gradients_fma<F>, dim3(tiles_of(a.tokens, F::ROWS), a.heads, a.batch), dim3(SIDE, SIDE), shared, call, stream);
  return status;
}

} // namespace portable
