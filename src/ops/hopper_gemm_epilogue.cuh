#pragma once
// Where the tiles of hopper_gemm.h lie, in shared memory and in the image, and how they are finished and written.
#include "hopper.cuh"
#include "hopper_gemm.h"

namespace hopper_gemm {
using namespace hopper;

constexpr int kThreads = 384; // producer warpgroup and two consumers
constexpr int kGroup = 8;     // tiles of pixels that are walked together with all columns, for the second-level cache
constexpr int kBlock = 64;    // columns per swizzled block of a transposed B

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

// The greater of two, NaN if one is.
__device__ __forceinline__ float at_least(float x, float floor) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(floor));
  return y;
}

enum class Second { None, Residual, Gate };

// Adds biases and the residual to a consumer's accumulators, rectifies or gates them, and writes them. Four lanes hold 32 columns of a row, 8 each after
// a transposition among them, so a row's store is 64 bytes and needs no shared memory. The code is straight-line, and short: it runs
// once per tile, so what it costs is the fetching of instructions.
template <int kRows, int kColumns, bool kHalf, Second kSecond>
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
      if constexpr (kSecond != Second::None) {
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
          if constexpr (kSecond != Second::None) {
            uint32_t add[4] = {residual[i][half].x, residual[i][half].y, residual[i][half].z, residual[i][half].w};
            transpose(add, q);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float2 pair = unpack<kHalf>(add[j]);
              float x = value[j * 4 + half * 2] + bias[j].x, y = value[j * 4 + half * 2 + 1] + bias[j].y;
              if constexpr (kSecond == Second::Residual) x = at_least(x + pair.x, p.floor), y = at_least(y + pair.y, p.floor);
              else x = pair.x <= 0 ? 0 : x, y = pair.y <= 0 ? 0 : y;
              words[j] = pack<kHalf>(x, y);
            }
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) words[j] = pack<kHalf>(at_least(value[j * 4 + half * 2] + bias[j].x, p.floor), at_least(value[j * 4 + half * 2 + 1] + bias[j].y, p.floor));
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

} // namespace hopper_gemm
