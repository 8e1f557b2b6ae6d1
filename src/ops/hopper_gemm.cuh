#pragma once
// The kernel of hopper_gemm.h: its producer, its consumers' main loop and the meeting of a split sum.
#include "hopper.cuh"
#include "hopper_gemm_epilogue.cuh"

namespace hopper_gemm {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The producer: one thread that keeps the stages filled.
template <int kRows, int kColumns, bool kTransposed>
__device__ __forceinline__ void produce(const Problem &p, uint32_t stages, uint32_t full, uint32_t empty, int rank_m, int rank_n, int rank_k, int cluster, int clusters) {
  using L = Layout<kRows, kColumns, kTransposed>;
  uint16_t mask_a = 0, mask_b = 0; // blocks that read the same pixels, the same weights
  int first_rank = rank_k * p.cm * p.cn;
  for (int i = 0; i < p.cn; ++i) mask_a |= 1 << (first_rank + rank_m * p.cn + i);
  for (int i = 0; i < p.cm; ++i) mask_b |= 1 << (first_rank + i * p.cn + rank_n);
  int stage = 0;
  uint32_t parity = 1;
  for (int index = cluster; index < p.tiles; index += clusters) {
    Tile tile = locate(p, index, rank_m, rank_n);
    Box box0 = locate_box<L::kBox>(p, 2 * tile.m), box1 = locate_box<L::kBox>(p, 2 * tile.m + 1);
    int column = tile.n * kColumns;
    int steps = p.steps[tile.phase], step = steps * rank_k / p.split, end = steps * (rank_k + 1) / p.split;
    int t = p.first_tap[tile.phase], depth = step;
    while (step < end && depth >= p.taps[t].steps) depth -= p.taps[t++].steps;
    for (; step < end; ++step) {
      Tap tap = p.taps[t];
      const CUtensorMap *map_a = &p.a[tap.a], *map_b = &p.b[tap.b];
      uint32_t to_a = stages + stage * (L::kA + L::kB), to_b = to_a + L::kA, ready = full + 8 * stage;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(ready, L::kA + L::kB);
      int channel = depth * kDepth;
      if (p.cn == 1) {
        load_4d(to_a, map_a, ready, channel, box0.x + tap.dx, box0.y + tap.dy, box0.sample);
        load_4d(to_a + L::kA / 2, map_a, ready, channel, box1.x + tap.dx, box1.y + tap.dy, box1.sample);
      } else {
        Box box = rank_n ? box1 : box0;
        load_4d_multicast(to_a + rank_n * (L::kA / 2), map_a, ready, mask_a, channel, box.x + tap.dx, box.y + tap.dy, box.sample);
      }
      if constexpr (kTransposed) {
        if (p.whole_blocks) load_4d(to_b, map_b, ready, 0, tap.tap, channel, column / kBlock);
        else
          for (int i = 0; i < L::kBlocks; ++i) load_3d(to_b + i * kBlock * kDepth * 2, map_b, ready, column + i * kBlock, tap.tap, channel);
      } else {
        int part = kColumns / 2 * rank_m;
        if (p.cm == 1) load_3d(to_b, map_b, ready, channel, tap.tap, column);
        else load_3d_multicast(to_b + part * kDepth * 2, map_b, ready, mask_b, channel, tap.tap, column + part);
      }
      if (++stage == L::kStages) stage = 0, parity ^= 1;
      if (++depth == tap.steps) depth = 0, ++t;
    }
  }
}

// Meeting of the blocks that share a tile's sum over K: unit u (64 x 32 numbers per warpgroup) is finished by block u % split, which the others send their
// parts of it, and added in the order of the blocks. Returns the set of units that are this block's. The producer takes part in the synchronisations.
template <int kUnits> __device__ __forceinline__ uint32_t reduce(float *acc, uint32_t memory, int thread, int rank, int rank_k, int stride, int split) {
  const int most = (kUnits + split - 1) / split; // units of a block
  const uint32_t mine = memory + thread * 16;
  cluster_sync(); // all loads of all blocks have been read: the stages are free
  uint32_t owned = 0;
  int owner = 0, index = 0;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (owner == rank_k) owned |= 1u << unit;
    else {
      int slot = rank_k - owner - 1 + (rank_k < owner ? split : 0); // of this sender at that owner
      uint32_t to = cluster_address(mine + (slot * most + index) * (4 * 256 * 16), rank + (owner - rank_k) * stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) store_cluster(to + i * 256 * 16, acc[unit * 16 + i * 4], acc[unit * 16 + i * 4 + 1], acc[unit * 16 + i * 4 + 2], acc[unit * 16 + i * 4 + 3]);
    }
    if (++owner == split) owner = 0, ++index;
  }
  cluster_sync();
  for (int sender = 0; sender < split; ++sender) {
    if (sender == rank_k) continue;
    uint32_t from = mine + (sender - rank_k - 1 + (sender < rank_k ? split : 0)) * most * (4 * 256 * 16);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      if (owned >> unit & 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float4 add;
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(add.x), "=f"(add.y), "=f"(add.z), "=f"(add.w) : "r"(from + i * 256 * 16));
          float *to = acc + unit * 16 + i * 4;
          to[0] += add.x, to[1] += add.y, to[2] += add.z, to[3] += add.w;
        }
        from += 4 * 256 * 16;
      }
  }
  return owned;
}

#endif

// kTransposed: B is stored as (K, columns), as the weights are for the gradient of the input. Grid: clusters of cm * cn * split
// blocks; each walks over tiles (one each where K is split).
template <int kRows, int kColumns, bool kTransposed, bool kHalf> __global__ void __launch_bounds__(kThreads, 1) gemm(const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kRows, kColumns, kTransposed>;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t stages = shared_address(memory), full = stages + L::kFull, empty = stages + L::kEmpty;
  const int blocks = p.cm * p.cn * p.split, rank = blocks > 1 ? cluster_rank() : 0;
  const int rank_n = rank % p.cn, rank_m = rank / p.cn % p.cm, rank_k = rank / (p.cn * p.cm);
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  if (threadIdx.x == 0) {
    if (stages & 1023) __trap(); // the swizzle counts from multiples of 1024
    for (int i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2 * (p.cm + p.cn - 1)); // the consumers of every block that the stage's loads come from or go to
    }
    barrier_init_fence();
    prefetch_map(&p.a[0]);
    prefetch_map(&p.b[0]);
  }
  wait_for_previous_kernel(); // nothing before this line touches its results
  if (blocks > 1) cluster_sync();
  else __syncthreads();

  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x == 0) produce<kRows, kColumns, kTransposed>(p, stages, full, empty, rank_m, rank_n, rank_k, cluster, clusters);
    __syncwarp();
    if (p.split > 1) cluster_sync(), cluster_sync(); // those of reduce
  } else {
    registers_increase<232>();
    constexpr int kHeight = kRows / 128, kUnits = L::kNumbers / 16; // blocks of 64 rows; units of 64 x 32 numbers per warpgroup
    const int thread = threadIdx.x - 128, group = thread >> 7;
    const uint32_t biases = stages + L::kBiases + group * kColumns * 4;
    // Which thread of the group tells which block that a stage has been read.
    const int to = thread & 127;
    const bool tells = to < blocks && to / (p.cn * p.cm) == rank_k && (to % p.cn == rank_n || to / p.cn % p.cm == rank_m);
    float acc[L::kNumbers];
    int stage = 0;
    uint32_t parity = 0;
    for (int index = cluster; index < p.tiles; index += clusters) {
      const Tile tile = locate(p, index, rank_m, rank_n);
      int steps = p.steps[tile.phase];
      steps = steps * (rank_k + 1) / p.split - steps * rank_k / p.split;
      float bias[(kColumns + 127) / 128];
#pragma unroll
      for (int i = 0; i < (kColumns + 127) / 128; ++i) bias[i] = i * 128 + to < kColumns ? column_bias<kRows, kColumns, kHalf>(p, tile, group, i * 128 + to) : 0;
      if (steps == 0)
#pragma unroll
        for (int i = 0; i < L::kNumbers; ++i) acc[i] = 0;
      int last = 0;
      for (int step = 0; step < steps; ++step) {
        const uint32_t a = stages + stage * (L::kA + L::kB) + group * (L::kA / 2), b = stages + stage * (L::kA + L::kB) + L::kA;
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          const uint64_t bd = kTransposed ? descriptor(b + k * 16 * kBlock * 2, kBlock * kDepth * 2, 8 * kBlock * 2, kSwizzle128) : descriptor(b + k * 32, 16, 1024, kSwizzle128);
#pragma unroll
          for (int i = 0; i < kHeight; ++i) {
            const uint64_t ad = descriptor(a + i * 64 * 128 + k * 32, 16, 1024, kSwizzle128);
            float *d = acc + i * (kColumns / 2);
            if constexpr (kColumns == 320) {
              Wgmma<192, kHalf, kTransposed>::run(d, ad, bd, step | k);
              Wgmma<128, kHalf, kTransposed>::run(d + 96, ad, bd + (192 * 128 >> 4), step | k);
            } else {
              Wgmma<kColumns, kHalf, kTransposed>::run(d, ad, bd, step | k);
            }
          }
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * last, to) : barrier_arrive(empty + 8 * last);
        }
        last = stage;
        if (++stage == L::kStages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      if (steps > 0 && tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * last, to) : barrier_arrive(empty + 8 * last);
      named_barrier(2 + group, 128);
#pragma unroll
      for (int i = 0; i < (kColumns + 127) / 128; ++i)
        if (i * 128 + to < kColumns) asm volatile("st.shared.f32 [%0], %1;" ::"r"(biases + (i * 128 + to) * 4), "f"(bias[i]) : "memory");
      named_barrier(2 + group, 128);
      uint32_t owned = ~0u; // units that this block finishes
      if (p.split > 1) owned = reduce<kUnits>(acc, stages, thread, rank, rank_k, p.cm * p.cn, p.split);
      if (p.sample_bias && p.log_w + p.log_h != kBoxLog<L::kBox>)
#pragma unroll
        for (int i = 0; i < L::kNumbers; ++i) {
          const int block = i / (kColumns / 2), number = i % (kColumns / 2);
          acc[i] += row_bias<kRows, kColumns, kHalf>(p, 2 * tile.m + group, block * 64 + (to >> 5) * 16 + (number >> 1 & 1) * 8 + ((to & 31) >> 2), tile.n * kColumns + number / 4 * 8 + (to & 3) * 2 + (number & 1));
        }
      if (!p.residual) finish<kRows, kColumns, kHalf, Second::None>(p, tile, acc, group, thread, biases, owned);
      else if (p.gate) finish<kRows, kColumns, kHalf, Second::Gate>(p, tile, acc, group, thread, biases, owned);
      else finish<kRows, kColumns, kHalf, Second::Residual>(p, tile, acc, group, thread, biases, owned);
    }
  }
  if (blocks > 1) cluster_sync(); // no block leaves while another may still write to or read from its shared memory
#endif
}

} // namespace hopper_gemm
