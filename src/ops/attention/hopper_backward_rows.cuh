// The two kernels around the key kernel: what is needed of each query row before it, and the rounding of dq after it. Both move bytes only.
#pragma once
#include "hopper_backward_parts.cuh"

namespace lcm::backward {

// statistics of every query: lse * log2(e) and D = sum_d out * dout. Queries past the last get lse = +inf, so that their probabilities are zero.
// One block of 256 threads per (query tile, batch * heads); 8 lanes read a row of 64. Clears dq_sum and the queue on the way.
template <class T>
__global__ void __launch_bounds__(256) prepare(Arguments p, const T *out, const T *dout, const float *lse, int64_t row_stride, int64_t batch_stride) {
  const int tile = blockIdx.x, bh = blockIdx.y, b = bh / p.heads, h = bh % p.heads, lane = threadIdx.x % 8;
  const size_t block = (size_t)bh * p.query_tiles + tile;
  wait_for_earlier_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *p.next_item = 0;
  uint4 a[4], g[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = tile * kTile + i * 32 + threadIdx.x / 8;
    const int64_t at = b * batch_stride + query * row_stride + h * kDim + lane * 8;
    const bool there = query < p.tokens;
    a[i] = there ? *reinterpret_cast<const uint4 *>(out + at) : make_uint4(0, 0, 0, 0);
    g[i] = there ? *reinterpret_cast<const uint4 *>(dout + at) : make_uint4(0, 0, 0, 0);
  }
  if (p.dq_sum) {
    float4 *sum = reinterpret_cast<float4 *>(p.dq_sum) + block * (kTile * kDim / 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i * 256 + threadIdx.x] = make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T *x = reinterpret_cast<const T *>(&a[i]), *y = reinterpret_cast<const T *>(&g[i]);
    float d = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) d += static_cast<float>(x[j]) * static_cast<float>(y[j]);
#pragma unroll
    for (int m = 1; m < 8; m *= 2) d += __shfl_xor_sync(~0u, d, m);
    const int row = i * 32 + threadIdx.x / 8, query = tile * kTile + row;
    if (lane == 0) {
      p.statistics[block * 256 + row] = query < p.tokens ? lse[(size_t)bh * p.tokens + query] * kLog2e : __int_as_float(0x7f800000);
      p.statistics[block * 256 + 128 + row] = d;
    }
  }
}

// dq = scale * dq_sum, from the order of wgmma's registers to rows. One block of 256 threads per (query tile, batch * heads).
template <class T> __global__ void __launch_bounds__(256) round_dq(Arguments p) {
  const int tile = blockIdx.x, bh = blockIdx.y, b = bh / p.heads, h = bh % p.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_earlier_kernel();
  const float4 *sum = reinterpret_cast<const float4 *>(p.dq_sum) + ((size_t)bh * p.query_tiles + tile) * (kTile * kDim / 4) + warp * 256 + lane;
  float d[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 x = sum[i * 32];
    d[i * 4] = x.x, d[i * 4 + 1] = x.y, d[i * 4 + 2] = x.z, d[i * 4 + 3] = x.w;
  }
  const int row = tile * kTile + warp * 16;
  store_rows<T>(d, p.scale, static_cast<T *>(p.dq.data) + b * p.dq.batch + row * p.dq.row + h * kDim, p.dq.row, p.tokens - row, lane);
}

} // namespace lcm::backward
