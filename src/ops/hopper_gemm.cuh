#pragma once
// The matrix product behind the convolutions and linear layers on Hopper: y (pixels, columns) = sum over taps and channels.
//
// A is gathered by the copy engine: 128 (or 64) output pixels form a box of the image (samples x rows x columns), and under
// a tap of the kernel they read the same box of the input, shifted; what lies outside of the image arrives as zeros, which is
// the padding. So the main loop is that of a plain product over (tap, 64 channels) steps. A linear layer is the case of one
// tap and an image of one row.
//
// One block computes 2 boxes with two consumer warpgroups (one per box) and a producer warp. Tiles are 256 x 160 or 128 x 320 where there are many:
// SDXL's channel counts are multiples of 320, and such tiles cover its images in multiples of 128, which suits 132 multiprocessors.
// The blocks of a cluster share loads (`cn` blocks side by side read the same pixels, `cm` blocks the same weights, by multicast) or
// split the sum over K (`split`; the parts meet in shared memory, added in a fixed order).
#include "hopper.cuh"
#include <cuda_runtime.h>

namespace hopper_gemm {
using namespace hopper;

constexpr int kDepth = 64;    // channels of a step: 128 bytes, the width of the swizzle
constexpr int kThreads = 384; // producer warpgroup and two consumers
constexpr int kMaxTaps = 25;
constexpr int kGroup = 8; // tiles of pixels that are walked together with all columns, for the second-level cache
constexpr int kBlock = 64; // columns per swizzled block of a transposed B

// A summand of every output: input shifted by (dy, dx), times the weights of `tap`, over `steps` * 64 channels.
struct Tap {
  int16_t a, b;   // tensor maps
  int16_t dy, dx; // shift of the box in A's image
  int16_t tap;    // second coordinate in B
  int16_t steps;
};

struct Problem {
  CUtensorMap a[4]; // (channels, width, height, samples); several where A is strided, one per parity of its pixels
  CUtensorMap b[2]; // (input channels, taps, output channels)
  Tap taps[kMaxTaps];
  int16_t first_tap[5], steps[4];     // per phase: its taps are first_tap[p] .. first_tap[p + 1]
  int16_t phase_y[4], phase_x[4];     // phase p makes the output pixels (phase_y + i * stride, phase_x + j * stride)
  int32_t stride;
  void *y;
  const void *bias, *sample_bias, *residual;
  int64_t y_row, residual_row; // numbers from pixel to pixel
  int32_t columns, samples, height, width; // of y
  int32_t log_w, log_h;                    // a box has 2^log_w columns, 2^log_h rows, and samples to fill it
  int32_t boxes_x, boxes_y;
  int32_t tiles_m, tiles_n, tiles; // in clusters; tiles counts those of all phases
  int32_t cm, cn, split;
};

// A transposed B comes in blocks of 64 columns, whole lines of memory if a tile starts at a multiple of 64: hence 320 or 256 columns there.
template <int kRows, int kColumns, bool kTransposed> struct Layout { // of shared memory
  static constexpr int kBox = kRows / 2;                             // pixels
  static constexpr int kBlocks = kColumns / kBlock;                  // of a transposed B
  static_assert(!kTransposed || kColumns % kBlock == 0, "");
  static constexpr int kA = kRows * kDepth * 2;
  static constexpr int kB = kColumns * kDepth * 2;
  static constexpr int kExtra = 2 * 8 * 6 + 2 * 4 * kColumns; // barriers (at most 6 stages), and a row of biases per warpgroup
  static constexpr int kStages = (227 * 1024 - kExtra) / (kA + kB) > 6 ? 6 : (227 * 1024 - kExtra) / (kA + kB);
  static constexpr int kBiases = kStages * (kA + kB), kFull = kBiases + 2 * 4 * kColumns, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
  static constexpr int kNumbers = kRows / 128 * kColumns / 2; // accumulators of a thread
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Tile {
  int phase, m, n;
};
__device__ __forceinline__ Tile locate(const Problem &p, int index, int rank_m, int rank_n) {
  Tile tile;
  int per_phase = p.tiles_m * p.tiles_n;
  tile.phase = index / per_phase;
  index -= tile.phase * per_phase;
  int group = index / (kGroup * p.tiles_n), inside = index - group * kGroup * p.tiles_n;
  int height = min(kGroup, p.tiles_m - group * kGroup);
  tile.n = inside / height * p.cn + rank_n;
  tile.m = (group * kGroup + inside % height) * p.cm + rank_m;
  return tile;
}
struct Box {
  int x, y, sample;
};
template <int kBox> constexpr int kBoxLog = kBox == 128 ? 7 : 6;
template <int kBox> __device__ __forceinline__ Box locate_box(const Problem &p, int index) {
  int row = index / p.boxes_x, sample = row / p.boxes_y;
  return {(index - row * p.boxes_x) << p.log_w, (row - sample * p.boxes_y) << p.log_h, sample << (kBoxLog<kBox> - p.log_w - p.log_h)};
}

// Lane q of four holds row q of a 4 x 4 matrix of words, and gets column q.
__device__ __forceinline__ void transpose(uint32_t (&w)[4], int q) {
  bool odd = q & 1, high = q & 2;
  uint32_t s0 = odd ? w[0] : w[1], s1 = odd ? w[2] : w[3];
  s0 = __shfl_xor_sync(~0u, s0, 1), s1 = __shfl_xor_sync(~0u, s1, 1);
  if (odd) w[0] = s0, w[2] = s1;
  else w[1] = s0, w[3] = s1;
  s0 = high ? w[0] : w[2], s1 = high ? w[1] : w[3];
  s0 = __shfl_xor_sync(~0u, s0, 2), s1 = __shfl_xor_sync(~0u, s1, 2);
  if (high) w[0] = s0, w[1] = s1;
  else w[2] = s0, w[3] = s1;
}
template <bool kHalf> __device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (kHalf) return __half22float2(*reinterpret_cast<__half2 *>(&word));
  else return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&word));
}
template <bool kHalf> __device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (kHalf) {
    __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
  }
}
__device__ __forceinline__ const char *at(const void *base, int64_t element) { return static_cast<const char *>(base) + 2 * element; }

template <bool kHalf> __device__ __forceinline__ float number(const void *base, int64_t element) {
  return unpack<kHalf>(__ldg(static_cast<const uint16_t *>(base) + element)).x;
}

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
        int part = kDepth / p.cm * rank_m; // rows of K that this block brings
        uint32_t to = to_b + part * kBlock * 2;
#pragma unroll
        for (int i = 0; i < L::kBlocks; ++i, to += kBlock * kDepth * 2)
          if (p.cm == 1) load_3d(to, map_b, ready, column + i * kBlock, tap.tap, channel);
          else load_3d_multicast(to, map_b, ready, mask_b, column + i * kBlock, tap.tap, channel + part);
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

// What the consumers add to a column: the bias, and that of the sample if the tile has only one.
template <int kRows, int kColumns, bool kHalf> __device__ __forceinline__ float column_bias(const Problem &p, const Tile &tile, int group, int column) {
  column += tile.n * kColumns;
  if (column >= p.columns) return 0;
  float sum = 0;
  if (p.bias) sum = number<kHalf>(p.bias, column);
  if (p.sample_bias && p.log_w + p.log_h == kBoxLog<kRows / 2>) {
    int sample = locate_box<kRows / 2>(p, 2 * tile.m + group).sample;
    if (sample < p.samples) sum += number<kHalf>(p.sample_bias, static_cast<int64_t>(sample) * p.columns + column);
  }
  return sum;
}

// Adds biases and the residual to a consumer's accumulators and writes them. Four lanes hold 32 columns of a row, 8 each after
// a transposition among them, so a row's store is 64 bytes and needs no shared memory. The code is straight-line, and short: it runs
// once per tile, so what it costs is the fetching of instructions.
template <int kRows, int kColumns, bool kHalf, bool kResidual>
__device__ __forceinline__ void finish(const Problem &p, const Tile &tile, const float *acc, int group, int thread, uint32_t biases, uint32_t owned) {
  constexpr int kParts = kColumns / 32, kBatch = kParts == 10 ? 5 : kParts == 8 ? 4 : kParts;
  const int lane = thread & 31, q = lane & 3, warp = (thread >> 5) & 3;
  const Box box = locate_box<kRows / 2>(p, 2 * tile.m + group);
  const int column = tile.n * kColumns + 8 * q; // the first of 8 that this lane reads and writes
  biases += 8 * q;
#pragma unroll
  for (int block = 0; block < kRows / 128; ++block) {
    int64_t pixel[2];
    bool inside[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = block * 64 + warp * 16 + half * 8 + (lane >> 2);
      int x = (box.x + (row & ((1 << p.log_w) - 1))) * p.stride + p.phase_x[tile.phase];
      row >>= p.log_w;
      int y = (box.y + (row & ((1 << p.log_h) - 1))) * p.stride + p.phase_y[tile.phase];
      int sample = box.sample + (row >> p.log_h);
      inside[half] = x < p.width && y < p.height && sample < p.samples;
      pixel[half] = (static_cast<int64_t>(sample) * p.height + y) * p.width + x;
    }
    char *to[2] = {const_cast<char *>(at(p.y, pixel[0] * p.y_row + column)), const_cast<char *>(at(p.y, pixel[1] * p.y_row + column))};
    const char *from[2] = {at(p.residual, pixel[0] * p.residual_row + column), at(p.residual, pixel[1] * p.residual_row + column)};
#pragma unroll
    for (int batch = 0; batch < kParts; batch += kBatch) {
      uint4 residual[kBatch][2];
      if constexpr (kResidual) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            residual[i][half] = make_uint4(0, 0, 0, 0);
            if (inside[half] && column + (batch + i) * 32 < p.columns) residual[i][half] = __ldg(reinterpret_cast<const uint4 *>(from[half] + (batch + i) * 64));
          }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int part = batch + i;
        const float *value = acc + (block * kParts + part) * 16;
        float2 bias[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(bias[j].x), "=f"(bias[j].y) : "r"(biases + part * 128 + j * 32));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4];
          if constexpr (kResidual) {
            uint32_t add[4] = {residual[i][half].x, residual[i][half].y, residual[i][half].z, residual[i][half].w};
            transpose(add, q);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float2 pair = unpack<kHalf>(add[j]);
              words[j] = pack<kHalf>(value[j * 4 + half * 2] + bias[j].x + pair.x, value[j * 4 + half * 2 + 1] + bias[j].y + pair.y);
            }
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) words[j] = pack<kHalf>(value[j * 4 + half * 2] + bias[j].x, value[j * 4 + half * 2 + 1] + bias[j].y);
          }
          transpose(words, q);
          if (inside[half] && column + part * 32 < p.columns && (owned >> (block * kParts + part) & 1))
            *reinterpret_cast<uint4 *>(to[half] + part * 64) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
}

// For tiles that span several (small) samples: adds each row's own sample bias.
template <int kRows, int kColumns, bool kHalf> __device__ __noinline__ float row_bias(const Problem &p, int box, int row, int column) {
  int sample = locate_box<kRows / 2>(p, box).sample + (row >> (p.log_w + p.log_h));
  if (sample >= p.samples || column >= p.columns) return 0;
  return number<kHalf>(p.sample_bias, static_cast<int64_t>(sample) * p.columns + column);
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
  if (blocks > 1) cluster_sync();
  else __syncthreads();

  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x == 0) produce<kRows, kColumns, kTransposed>(p, stages, full, empty, rank_m, rank_n, rank_k, cluster, clusters);
    __syncwarp();
    if (p.split > 1) cluster_sync();
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
      if (p.split > 1) {
        // Units that another block finishes go there through shared memory. The stages are free: all loads have been read.
        named_barrier(1, 256);
        owned = 0;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          if (unit % p.split == rank_k) owned |= 1u << unit;
          else
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float *from = acc + unit * 16 + i * 4;
              asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(stages + ((unit * 4 + i) * 256 + thread) * 16), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]) : "memory");
            }
        }
        cluster_sync();
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit)
          if (owned >> unit & 1)
            for (int other = 0; other < p.split; ++other) {
              if (other == rank_k) continue;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                float4 add = load_cluster(stages + ((unit * 4 + i) * 256 + thread) * 16, rank + (other - rank_k) * p.cm * p.cn);
                float *to = acc + unit * 16 + i * 4;
                to[0] += add.x, to[1] += add.y, to[2] += add.z, to[3] += add.w;
              }
            }
      }
      if (p.sample_bias && p.log_w + p.log_h != kBoxLog<L::kBox>)
#pragma unroll
        for (int i = 0; i < L::kNumbers; ++i) {
          const int block = i / (kColumns / 2), number = i % (kColumns / 2);
          acc[i] += row_bias<kRows, kColumns, kHalf>(p, 2 * tile.m + group, block * 64 + (to >> 5) * 16 + (number >> 1 & 1) * 8 + ((to & 31) >> 2), tile.n * kColumns + number / 4 * 8 + (to & 3) * 2 + (number & 1));
        }
      if (p.residual) finish<kRows, kColumns, kHalf, true>(p, tile, acc, group, thread, biases, owned);
      else finish<kRows, kColumns, kHalf, false>(p, tile, acc, group, thread, biases, owned);
    }
  }
  if (blocks > 1) cluster_sync(); // no block leaves while another may still write to or read from its shared memory
#endif
}

} // namespace hopper_gemm
