// dq alone, per tile of queries: for the deterministic mode and where the gradients of (most) keys are not wanted, such as frozen text.
//
// An item of work is (tile of 128 queries, head, sample); each warpgroup owns 64 of the queries and walks over the keys of both sources in tiles of 128:
//   S = Q K^T, dP = dO V^T (64 x 128 each), dS = exp2(S * scale * log2 e - lse) * (dP - D), dQ += dS K with dS straight from the registers.
// No sum leaves the registers before it is whole, so the result does not depend on the order of anything. A warp of a third warpgroup loads,
// q and dout of the next item and two tiles of keys ahead.
#pragma once
#include "hopper_backward_parts.cuh"

namespace lcm::backward {

constexpr int kKeyStages = 3;
struct QueryMemory {
  uint8_t q[2][kTileBytes], dout[2][kTileBytes], k[kKeyStages][kTileBytes], v[kKeyStages][kTileBytes];
  uint64_t q_full[2], q_empty[2], k_full[kKeyStages], k_empty[kKeyStages];
};

struct QueryItem {
  int tile, head, sample, key_tiles;
  __device__ QueryItem(const Arguments &p, int index) : tile(index % p.query_tiles) {
    index /= p.query_tiles;
    head = index % p.heads;
    sample = index / p.heads;
    key_tiles = p.own_tiles + (p.reference_tiles && p.uses_reference(sample) ? p.reference_tiles : 0);
  }
};

__device__ inline void load_queries(const Maps &maps, const Arguments &p, QueryMemory &s) {
  int stage = 0, phase = 0, count = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, ++count) {
    const QueryItem item(p, index);
    const int at = count & 1;
    barrier_wait(&s.q_empty[at], (count >> 1 & 1) ^ 1);
    barrier_expect(&s.q_full[at], 2 * kTileBytes);
    load_box(s.q[at], &maps.q, &s.q_full[at], 0, item.head, item.tile * kTile, item.sample);
    load_box(s.dout[at], &maps.dout, &s.q_full[at], 0, item.head, item.tile * kTile, item.sample);
    for (int t = 0; t < item.key_tiles; ++t) {
      const bool own = t < p.own_tiles;
      const int key = (own ? t : t - p.own_tiles) * kTile, sample = !own && p.reference_batch == 1 ? 0 : item.sample;
      barrier_wait(&s.k_empty[stage], phase ^ 1);
      barrier_expect(&s.k_full[stage], 2 * kTileBytes);
      load_box(s.k[stage], own ? &maps.k : &maps.k2, &s.k_full[stage], 0, item.head, key, sample);
      load_box(s.v[stage], own ? &maps.v : &maps.v2, &s.k_full[stage], 0, item.head, key, sample);
      if (++stage == kKeyStages) stage = 0, phase ^= 1;
    }
  }
}

template <class T> __device__ inline void consume_queries(const Arguments &p, QueryMemory &s, int group, int warp, int lane) {
  const float scale = p.scale * kLog2e;
  int stage = 0, phase = 0, count = 0;
  for (int index = blockIdx.x; index < p.items; index += gridDim.x, ++count) {
    const QueryItem item(p, index);
    const int at = count & 1, row = group * 64 + warp * 16;
    const float *statistics = p.statistics + ((size_t)(item.sample * p.heads + item.head) * p.query_tiles + item.tile) * (2 * kTile) + row + lane / 4;
    const float lse[2] = {statistics[0], statistics[8]}, big_d[2] = {statistics[kTile], statistics[kTile + 8]};
    float dq[32], st[64];
#pragma unroll
    for (int i = 0; i < 32; ++i) dq[i] = 0;
    barrier_wait(&s.q_full[at], count >> 1 & 1);
    const uint64_t q_rows = describe(s.q[at]) + group * 512, dout_rows = describe(s.dout[at]) + group * 512; // 64 rows are 8192 bytes
    barrier_wait(&s.k_full[stage], phase);
    wgmma_fence();
    multiply_rows<T>(st, q_rows, describe(s.k[stage]));
    wgmma_commit();
    wgmma_wait<0>();
    pin(st);
    for (int t = 0; t < item.key_tiles; ++t) {
      float dp[64];
      uint32_t ds[32];
      wgmma_fence();
      multiply_rows<T>(dp, dout_rows, describe(s.v[stage]));
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < 64; ++i) st[i] = exp2_fast(fmaf(st[i], scale, -lse[i >> 1 & 1]));
      wgmma_wait<0>();
      pin(dp);
#pragma unroll
      for (int i = 0; i < 32; ++i) ds[i] = pack<T>(st[i * 2] * (dp[i * 2] - big_d[i & 1]), st[i * 2 + 1] * (dp[i * 2 + 1] - big_d[i & 1]));
      // Keys past the last have zero rows in k, but 0 * inf would be NaN in dq.
      const int keys = t < p.own_tiles ? p.own_tokens - t * kTile : p.reference_tokens - (t - p.own_tiles) * kTile;
      if (keys < kTile) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int key = i / 2 * 8 + (lane & 3) * 2;
          ds[i] &= key + 1 < keys ? 0xffffffffu : key < keys ? 0xffffu : 0u;
        }
      }
      pin(ds);
      wgmma_fence();
      multiply_packed<T>(dq, ds, describe(s.k[stage]));
      wgmma_commit();
      const int used = stage;
      if (++stage == kKeyStages) stage = 0, phase ^= 1;
      if (t + 1 < item.key_tiles) {
        barrier_wait(&s.k_full[stage], phase);
        wgmma_fence();
        multiply_rows<T>(st, q_rows, describe(s.k[stage]));
        wgmma_commit();
      } else if (lane == 0) barrier_arrive(&s.q_empty[at]);
      wgmma_wait<0>();
      pin(dq);
      pin(st);
      if (lane == 0) barrier_arrive(&s.k_empty[used]);
    }
    const int query = item.tile * kTile + row;
    store_rows<T>(dq, p.scale, static_cast<T *>(p.dq.data) + item.sample * p.dq.batch + query * p.dq.row + item.head * kDim, p.dq.row, p.tokens - query, lane);
  }
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) query_gradients(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  QueryMemory &s = *reinterpret_cast<QueryMemory *>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&s.q_full[i], 1), barrier_init(&s.q_empty[i], 8);
    for (int i = 0; i < kKeyStages; ++i) barrier_init(&s.k_full[i], 1), barrier_init(&s.k_empty[i], 8);
    barrier_init_done();
  }
  __syncthreads();
  wait_for_earlier_kernel();
  if (p.keys_follow) let_next_kernel_start();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    registers_lower<24>();
    if (threadIdx.x == 0) load_queries(maps, p, s);
  } else {
    registers_raise<240>();
    consume_queries<T>(p, s, group - 1, threadIdx.x / 32 % 4, threadIdx.x % 32);
  }
#endif
}

} // namespace lcm::backward
