#pragma once
// The gradients of attention of 16-bit tensors on the matrix units of any architecture since sm_80. Queries' and keys' gradients come from two kernels,
// each of which makes the weights anew: 7 products instead of 5, but every sum has one owner, so that nothing is added atomically and the same inputs
// give the same bits.
#include "portable_gradient.cuh"
#include "portable_mma.cuh"

namespace portable {

// dk, dv (own_tokens and reference_tokens, heads * head_dim) of 64 keys: with the weights p = exp(scale q k^T - lse), dv = p^T dout and
// dk = scale (p * (dout v^T - row dot))^T q. Grid: (tiles of 64 keys, heads, batch). Each of the 4 warps owns 16 keys and goes over the queries, `STEP` at a
// time, with keys as the products' rows: the weights' registers are then the operand that meets dout and q, and never touch shared memory.
template <typename T, int D, int STEP> __global__ void __launch_bounds__(THREADS) key_gradients_mma(const __grid_constant__ Gradient call) {
  constexpr int TILE = 64, SIZE = TILE * STRIDE<D>, STEP_SIZE = STEP * STRIDE<D>;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) unsigned char shared[];
  T *keys = reinterpret_cast<T *>(shared), *values = keys + SIZE, *queries = values + SIZE, *douts = queries + 2 * STEP_SIZE;
  float *lses = reinterpret_cast<float *>(douts + 2 * STEP_SIZE), *dots = lses + 2 * STEP;

  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const KeyGradient to = key_gradient(call, blockIdx.x, TILE, blockIdx.z, head);
  if (to.samples == 0) return;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const bool causal = a.causal && to.keys.own;
  const int first_step = causal ? to.keys.first / STEP : 0, steps = max(tiles_of(a.tokens, STEP) - first_step, 0), all = steps * to.samples;

  // Queries past the end, and those of a sample that does not see the reference, get an infinite lse: their weights are zero.
  auto copy_queries = [&](int i) {
    const int sample = to.sample + i / steps, first = (first_step + i % steps) * STEP, stage = i % 2;
    copy_tile<T, STEP, D>(queries + stage * STEP_SIZE, a.q, sample * a.q_batch + column, a.q_row, first, a.tokens, a.head_dim);
    copy_tile<T, STEP, D>(douts + stage * STEP_SIZE, call.g.dout, sample * a.out_batch + column, a.out_row, first, a.tokens, a.head_dim);
    const bool visible = to.keys.own || sees_reference(a, sample);
    const int64_t row = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + first;
    for (int q = threadIdx.x; q < STEP; q += THREADS) {
      if (visible && first + q < a.tokens) {
        mma::copy_4(lses + stage * STEP + q, a.lse + row + q);
        mma::copy_4(dots + stage * STEP + q, call.row_dots + row + q);
      } else {
        lses[stage * STEP + q] = INFINITY;
        dots[stage * STEP + q] = 0.f;
      }
    }
  };
  copy_tile<T, TILE, D>(keys, to.keys.k, to.keys.k_offset, to.keys.k_row, to.keys.first, to.keys.rows, a.head_dim);
  copy_tile<T, TILE, D>(values, to.keys.v, to.keys.v_offset, to.keys.v_row, to.keys.first, to.keys.rows, a.head_dim);
  if (all > 0) copy_queries(0);
  mma::commit();

  const float scale = a.scale * mma::LOG2_E;
  T *own_keys = keys + warp * 16 * STRIDE<D>, *own_values = values + warp * 16 * STRIDE<D>;
  const int key = to.keys.first + warp * 16 + lane / 4;
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  for (int i = 0; i < all; i++) {
    if (i + 1 < all) copy_queries(i + 1);
    mma::commit();
    mma::wait<1>();
    __syncthreads();

    const int stage = i % 2, first = (first_step + i % steps) * STEP;
    const T *step_queries = queries + stage * STEP_SIZE, *step_douts = douts + stage * STEP_SIZE;
    float weights[STEP / 8][4], slopes[STEP / 8][4];
    dot_rows<T, STEP, D>(weights, own_keys, step_queries);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
      const float2 lse = *reinterpret_cast<const float2 *>(lses + stage * STEP + n * 8 + lane % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        weights[n][e] = mma::exp2_fast(weights[n][e] * scale - (e % 2 ? lse.y : lse.x) * mma::LOG2_E);
        if (causal && key + e / 2 * 8 > first + n * 8 + lane % 4 * 2 + e % 2) weights[n][e] = 0.f;
      }
    }
    add_weighted<T, STEP, D>(dv, weights, step_douts);
    dot_rows<T, STEP, D>(slopes, own_values, step_douts);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
      const float2 dot = *reinterpret_cast<const float2 *>(dots + stage * STEP + n * 8 + lane % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; e++) slopes[n][e] = weights[n][e] * (slopes[n][e] - (e % 2 ? dot.y : dot.x));
    }
    add_weighted<T, STEP, D>(dk, slopes, step_queries);
    __syncthreads();
  }
  mma::wait<0>();
  __syncthreads();
  const int first = to.keys.first + warp * 16;
  store_rows<T, D>(dk, a.scale, a.scale, own_keys, to.dk, to.dk_offset, to.dk_row, first, to.keys.rows, a.head_dim);
  store_rows<T, D>(dv, 1.f, 1.f, own_values, to.dv, to.dv_offset, to.dv_row, first, to.keys.rows, a.head_dim);
}

// dq (batch, tokens, heads * head_dim) = scale (p * (dout [v; v2]^T - row dot)) [k; k2]. Grid: (tiles of 64 queries, heads, batch); each of the 4 warps owns
// 16 queries and goes over the keys, `STEP` at a time.
template <typename T, int D, int STEP> __global__ void __launch_bounds__(THREADS) query_gradients_mma(const __grid_constant__ Gradient call) {
  constexpr int TILE = 64, SIZE = TILE * STRIDE<D>, STEP_SIZE = STEP * STRIDE<D>;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) unsigned char shared[];
  T *queries = reinterpret_cast<T *>(shared), *douts = queries + SIZE, *keys = douts + SIZE, *values = keys + 2 * STEP_SIZE;

  const int head = blockIdx.y, sample = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_query = blockIdx.x * TILE, query = first_query + warp * 16 + lane / 4;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const VisibleTiles tiles(a, STEP, min(first_query + TILE, a.tokens) - 1, sample);

  auto copy_keys = [&](int i) {
    const Keys s = keys_of_tile(a, tiles.index(i), STEP, sample, head);
    copy_tile<T, STEP, D>(keys + i % 2 * STEP_SIZE, s.k, s.k_offset, s.k_row, s.first, s.rows, a.head_dim);
    copy_tile<T, STEP, D>(values + i % 2 * STEP_SIZE, s.v, s.v_offset, s.v_row, s.first, s.rows, a.head_dim);
  };
  copy_tile<T, TILE, D>(queries, a.q, sample * a.q_batch + column, a.q_row, first_query, a.tokens, a.head_dim);
  copy_tile<T, TILE, D>(douts, call.g.dout, sample * a.out_batch + column, a.out_row, first_query, a.tokens, a.head_dim);
  if (tiles.all > 0) copy_keys(0);
  mma::commit();

  const float scale = a.scale * mma::LOG2_E;
  float lse[2], dot[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens + query + half * 8;
    const bool real = query + half * 8 < a.tokens;
    lse[half] = real ? a.lse[row] * mma::LOG2_E : INFINITY;
    dot[half] = real ? call.row_dots[row] : 0.f;
  }
  T *own_queries = queries + warp * 16 * STRIDE<D>, *own_douts = douts + warp * 16 * STRIDE<D>;
  float dq[D / 8][4] = {};
  for (int i = 0; i < tiles.all; i++) {
    if (i + 1 < tiles.all) copy_keys(i + 1);
    mma::commit();
    mma::wait<1>();
    __syncthreads();

    const Keys s = keys_of_tile(a, tiles.index(i), STEP, sample, head);
    const T *step_keys = keys + i % 2 * STEP_SIZE, *step_values = values + i % 2 * STEP_SIZE;
    const bool causal = a.causal && s.own;
    float weights[STEP / 8][4], slopes[STEP / 8][4];
    dot_rows<T, STEP, D>(weights, own_queries, step_keys);
    dot_rows<T, STEP, D>(slopes, own_douts, step_values);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = s.first + n * 8 + lane % 4 * 2 + e % 2;
        const bool visible = key < s.rows && !(causal && key > query + e / 2 * 8);
        slopes[n][e] = visible ? mma::exp2_fast(weights[n][e] * scale - lse[e / 2]) * (slopes[n][e] - dot[e / 2]) : 0.f;
      }
    add_weighted<T, STEP, D>(dq, slopes, step_keys);
    __syncthreads();
  }
  mma::wait<0>();
  __syncthreads();
  store_rows<T, D>(dq, a.scale, a.scale, own_queries, call.g.dq, sample * call.g.dq_batch + column, call.g.dq_row, first_query + warp * 16, a.tokens,
                   a.head_dim);
}

template <typename T, int D, int STEP> int launch_backward_mma(const Gradient &call, cudaStream_t stream) {
  const LcmAttention &a = call.g.forward;
  const size_t tiles = (2 * 64 + 4 * STEP) * STRIDE<D> * sizeof(T);
  int status = launch(key_gradients_mma<T, D, STEP>, dim3(key_blocks(call, 64), a.heads, a.batch), THREADS, tiles + 4 * STEP * sizeof(float), call, stream);
  if (status == 0 && call.g.dq != nullptr)
    status = launch(query_gradients_mma<T, D, STEP>, dim3(tiles_of(a.tokens, 64), a.heads, a.batch), THREADS, tiles, call, stream);
  return status;
}

} // namespace portable
