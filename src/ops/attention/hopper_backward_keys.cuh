// dk and dv of both sources, and (kDq) the f32 sum of dq: everything that is computed per tile of keys.
//
// An item of work is (tile of 128 keys, head, sample), or (tile, head) over all samples for a reference that the batch shares, whose sum then stays in
// registers. Each warpgroup owns 64 of the keys and walks over the queries in tiles of 128, five products a tile:
//   S^T = K Q^T, dP^T = V dO^T (64 x 128 each), P = exp2(S * scale * log2 e - lse), dS = P * (dP - D),
//   dV += P^T dO, dK += dS^T Q (their left sides straight from the registers S^T and dP^T came in), and
//   dQ (128 queries x 64) = dS K, whose left side goes through shared memory because each warpgroup takes 64 of the queries and all 128 keys;
//   each warp adds its 16 rows to dq_sum by a bulk copy that adds, in the order of the registers. The second-level cache, where these additions are made,
//   is the tightest bound found: one build, otherwise the same, took 1.94 ms with them and 1.43 without (10 heads, 4096 queries, 8192 keys, batch 4, H100).
// Four of the products, S^T of the next tile among them, are queued at once; the two warpgroups take turns with the arithmetic between (not where dq is
// not computed: there nothing ties them together, and they fall into step by themselves).
// A warp of a third warpgroup loads: k and v of the next item and two tiles of q and dout are under way. It also draws the items from a queue,
// the longest (shared reference) first, so that the SMs end together.
#pragma once
#include "hopper_backward_parts.cuh"

namespace lcm::backward {

constexpr int kQueryStages = 2;
struct KeyMemory {
  uint8_t q[kQueryStages][kTileBytes], dout[kQueryStages][kTileBytes], k[2][kTileBytes], v[2][kTileBytes];
  uint8_t ds[2][2][kTileBytes]; // [buffer][half of the queries]: 128 keys x 64 queries, queries contiguous
  float dq[8][32 * 32];         // of each warp: its part of a tile of dq on the way to dq_sum
  float statistics[kQueryStages][2][kTile];
  uint64_t q_full[kQueryStages], dout_full[kQueryStages], empty[kQueryStages], item_full[2], item_empty[2], ds_full[2];
  int item[2];
};

struct Item {
  int reference, tile, head, first, end; // samples first .. end
  __device__ Item(const Arguments &p, int index) {
    reference = index < p.reference_items;
    if (!reference) index -= p.reference_items;
    const int tiles = reference ? p.reference_tiles : p.own_tiles;
    tile = index % tiles;
    index /= tiles;
    head = index % p.heads;
    first = index / p.heads;
    end = first + 1;
    if (reference && p.reference_batch == 1) end = p.batch;
  }
  __device__ int sample_of_keys(const Arguments &p) const { return reference && p.reference_batch == 1 ? 0 : first; }
  __device__ bool sees(const Arguments &p, int b) const { return !reference || p.uses_reference(b); }
};

__device__ inline void load_items(const Maps &maps, const Arguments &p, KeyMemory &s) {
  int stage = 0, phase = 0;
  for (int count = 0, index = blockIdx.x;; ++count) {
    const int at = count & 1;
    barrier_wait(&s.item_empty[at], (count >> 1 & 1) ^ 1);
    s.item[at] = index;
    if (index >= p.items) { barrier_arrive(&s.item_full[at]); return; }
    const Item item(p, index);
    barrier_expect(&s.item_full[at], 2 * kTileBytes);
    const int sample = item.sample_of_keys(p);
    load_box(s.k[at], item.reference ? &maps.k2 : &maps.k, &s.item_full[at], 0, item.head, item.tile * kTile, sample);
    load_box(s.v[at], item.reference ? &maps.v2 : &maps.v, &s.item_full[at], 0, item.head, item.tile * kTile, sample);
    for (int b = item.first; b < item.end; ++b) {
      if (!item.sees(p, b)) continue;
      const float *statistics = p.statistics + (size_t)(b * p.heads + item.head) * p.query_tiles * (2 * kTile);
      for (int m = 0; m < p.query_tiles; ++m) {
        barrier_wait(&s.empty[stage], phase ^ 1);
        barrier_expect(&s.q_full[stage], kTileBytes + kStatisticsBytes);
        load_box(s.q[stage], &maps.q, &s.q_full[stage], 0, item.head, m * kTile, b);
        load_bytes(s.statistics[stage], statistics + m * (2 * kTile), kStatisticsBytes, &s.q_full[stage]);
        barrier_expect(&s.dout_full[stage], kTileBytes);
        load_box(s.dout[stage], &maps.dout, &s.dout_full[stage], 0, item.head, m * kTile, b);
        if (++stage == kQueryStages) stage = 0, phase ^= 1;
      }
    }
    index = gridDim.x + atomicAdd(p.next_item, 1);
  }
}

template <class T, bool kDq> struct KeyConsumer {
  const Arguments &p;
  KeyMemory &s;
  const int group, warp, lane; // warpgroup 0 or 1, warp of it, lane
  int stage = 0, phase = 0, tiles = 0;

  // One query tile. The scores `st` are there when it begins; when it ends, those of the next tile are (kMore).
  template <bool kMore>
  __device__ __forceinline__ void step(float (&st)[64], float (&dk)[32], float (&dv)[32], uint64_t k_rows, uint64_t v_rows, uint64_t k_all, float *dq_sum, int keys) {
    const float scale = p.scale * kLog2e;
    const float *lse = s.statistics[stage][0] + (lane & 3) * 2, *big_d = lse + kTile;
    float dp[64];
    uint32_t pp[32], ds[32];
    barrier_wait(&s.dout_full[stage], phase);
    wgmma_fence();
    multiply_rows<T>(dp, v_rows, describe(s.dout[stage]));
    wgmma_commit();
    if constexpr (kDq) await_turn();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 l = *reinterpret_cast<const float2 *>(lse + i * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) st[i * 4 + j] = exp2_fast(fmaf(st[i * 4 + j], scale, -(j & 1 ? l.y : l.x)));
    }
    wgmma_wait<0>();
    pin(dp);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 d = *reinterpret_cast<const float2 *>(big_d + i * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = i * 4 + j * 2;
        pp[i * 2 + j] = pack<T>(st[at], st[at + 1]);
        ds[i * 2 + j] = pack<T>(st[at] * (dp[at] - d.x), st[at + 1] * (dp[at + 1] - d.y));
      }
    }
    // Keys past the last have zero rows in k, but 0 * inf would be NaN in dq.
    if (kDq && keys < kTile) {
      const int key = group * 64 + warp * 16 + lane / 4;
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (key + (i & 1) * 8 >= keys) ds[i] = 0;
    }
    pin(pp);
    pin(ds);
    if constexpr (kDq) pass_turn();
    wgmma_fence();
    multiply_packed<T>(dv, pp, describe(s.dout[stage]));
    wgmma_commit();
    const int buffer = tiles & 1;
    if constexpr (kDq) {
      const int key = group * 64 + warp * 16 + (lane & 15);
      const uint32_t row = shared_address(s.ds[buffer]) + key * 128;
#pragma unroll
      for (int k = 0; k < 8; ++k)
        store_matrices(row + k / 4 * kTileBytes + (((k & 3) * 2 + (lane >> 4)) ^ (key & 7)) * 16, ds[k * 4], ds[k * 4 + 1], ds[k * 4 + 2], ds[k * 4 + 3]);
      fence_shared_for_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.ds_full[buffer]);
    }
    multiply_packed<T>(dk, ds, describe(s.q[stage]));
    wgmma_commit();
    wgmma_wait<1>();
    const int used = stage;
    phase ^= stage;
    stage ^= 1;
    if constexpr (kMore) {
      barrier_wait(&s.q_full[stage], phase);
      wgmma_fence();
      multiply_rows<T>(st, k_rows, describe(s.q[stage]));
      wgmma_commit();
    }
    float dq[32];
    if constexpr (kDq) {
      barrier_wait(&s.ds_full[buffer], tiles >> 1 & 1);
      ++tiles;
      wgmma_fence();
      const uint64_t rows = describe(s.ds[buffer][group]);
#pragma unroll
      for (int k = 0; k < 8; ++k) wgmma_64x64_shared_mn<T>(dq, rows + k * 128, k_all + k * 128, k != 0);
      wgmma_commit();
    }
    wgmma_wait<kMore + kDq>();
    if (lane == 0) barrier_arrive(&s.empty[used]);
    wgmma_wait<0>();
    pin(st);
    if constexpr (kDq) {
      pin(dq);
      add_dq(dq, dq_sum);
    }
  }

  // The warpgroups take turns with the arithmetic of a tile, so that one's falls on the other's products.
  __device__ __forceinline__ void await_turn() const { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
  __device__ __forceinline__ void pass_turn() const { asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory"); }

  // Adds this warp's 16 rows of a tile of dq to the sum, in the order of the registers, by one bulk copy.
  __device__ __forceinline__ void add_dq(const float (&dq)[32], float *dq_sum) const {
    float *part = s.dq[group * 4 + warp];
    if (lane == 0) bulk_reads_done();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) *reinterpret_cast<float4 *>(part + i * 128 + lane * 4) = make_float4(dq[i * 4], dq[i * 4 + 1], dq[i * 4 + 2], dq[i * 4 + 3]);
    fence_shared_for_async();
    __syncwarp();
    if (lane == 0) add_bytes(dq_sum + (group * 4 + warp) * 1024, part, 4096);
  }

  __device__ __forceinline__ void run() {
    if (kDq && group == 1) pass_turn();
    for (int count = 0;; ++count) {
      const int at = count & 1;
      barrier_wait(&s.item_full[at], count >> 1 & 1);
      const int index = s.item[at];
      if (index >= p.items) break;
      const Item item(p, index);
      const int keys = (item.reference ? p.reference_tokens : p.own_tokens) - item.tile * kTile;
      float dk[32], dv[32], st[64];
#pragma unroll
      for (int i = 0; i < 32; ++i) dk[i] = 0, dv[i] = 0;
      const uint64_t k_all = describe(s.k[at]), k_rows = k_all + group * 512, v_rows = describe(s.v[at]) + group * 512; // 64 rows are 8192 bytes
      for (int b = item.first; b < item.end; ++b) {
        if (!item.sees(p, b)) continue;
        float *dq_sum = p.dq_sum + (size_t)(b * p.heads + item.head) * p.query_tiles * (kTile * kDim);
        barrier_wait(&s.q_full[stage], phase);
        wgmma_fence();
        multiply_rows<T>(st, k_rows, describe(s.q[stage]));
        wgmma_commit();
        wgmma_wait<0>();
        pin(st);
        for (int m = p.query_tiles; --m; dq_sum += kTile * kDim) step<true>(st, dk, dv, k_rows, v_rows, k_all, dq_sum, keys);
        step<false>(st, dk, dv, k_rows, v_rows, k_all, dq_sum, keys);
      }
      pin(dk);
      pin(dv);
      if (lane == 0) barrier_arrive(&s.item_empty[at]);
      const int sample = item.sample_of_keys(p), row = item.tile * kTile + group * 64 + warp * 16, rows = keys - group * 64 - warp * 16;
      store(item.reference ? p.dk2 : p.dk, dk, p.scale, sample, row, item.head, rows);
      store(item.reference ? p.dv2 : p.dv, dv, 1.0f, sample, row, item.head, rows);
    }
    if (kDq && lane == 0) bulk_writes_done();
  }

  __device__ inline void store(const Gradient &to, const float (&d)[32], float factor, int sample, int row, int head, int rows) const {
    if (to.data) store_rows<T>(d, factor, static_cast<T *>(to.data) + sample * to.batch + row * to.row + head * kDim, to.row, rows, lane);
  }
};

template <class T, bool kDq> __global__ void __launch_bounds__(kThreads, 1) key_gradients(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  KeyMemory &s = *reinterpret_cast<KeyMemory *>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&s.item_full[i], 1), barrier_init(&s.item_empty[i], 8), barrier_init(&s.ds_full[i], 8);
    for (int i = 0; i < kQueryStages; ++i) barrier_init(&s.q_full[i], 1), barrier_init(&s.dout_full[i], 1), barrier_init(&s.empty[i], 8);
    barrier_init_done();
  }
  __syncthreads();
  if (!p.after_queries) wait_for_earlier_kernel();
  if constexpr (kDq) let_next_kernel_start(); // that which rounds dq
  const int group = threadIdx.x / 128;
  if (group == 0) {
    registers_lower<24>();
    if (threadIdx.x == 0) load_items(maps, p, s);
  } else {
    registers_raise<240>();
    KeyConsumer<T, kDq>{p, s, group - 1, static_cast<int>(threadIdx.x / 32) % 4, static_cast<int>(threadIdx.x % 32)}.run();
  }
  if (p.after_queries) wait_for_earlier_kernel(); // so that the end of this kernel is the end of both
#endif
}

} // namespace lcm::backward
