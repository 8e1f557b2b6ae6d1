// Softmax over tiles of keys in the registers of a warpgroup, and the slow way round for the rare tile that needs it.
#pragma once
#include "hopper_ptx.cuh"

#include <type_traits>

namespace lcm::hopper {

constexpr int D = 64;     // head dimension
constexpr int KEYS = 128; // keys of a tile

__device__ inline float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <class T> __device__ inline uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

  // Columns from `valid` on are no keys.
  __device__ inline void mask(float (&s)[KEYS / 2], int valid) {
    if (valid < KEYS) {
      const int column = (threadIdx.x & 3) * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        if (column + (i / 4) * 8 + (i & 1) >= valid) s[i] = -INFINITY;
    }
  }

// Softmax of one thread's two rows (r and r + 8 of its warp's 16) over the tiles of keys, relative to a maximum per row that need not be
// the true one: in f32 exp2(x) is as exact at 2^60 as at 1. So the maximum of the first tile serves for all the others until the weights
// of a tile grow beyond LIMIT; only then is that tile done again with a new maximum. This spares a compare per score and, more,
// lets the exponentials start without waiting for a row's maximum.
template <class T> struct Softmax {
  static constexpr float LIMIT = std::is_same_v<T, __half> ? 16384.f : 1e18f; // of a thread's sum; the weights are rounded to T
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  __device__ static void sums(const float (&s)[KEYS / 2], float (&t)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float a = s[row * 2], b = s[row * 2 + 1];
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) a += s[i + row * 2], b += s[i + row * 2 + 1];
      t[row] = a + b;
    }
  }

  // Scores become weights under the maximum raised to theirs; correction: what earlier weights are worth under it.
  __device__ void raise(float (&s)[KEYS / 2], float scale, float (&correction)[2]) {
    float t[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float a = s[row * 2], b = s[row * 2 + 1];
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) a = fmaxf(a, s[i + row * 2]), b = fmaxf(b, s[i + row * 2 + 1]);
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(0xffffffff, a, 1));
      a = fmaxf(a, __shfl_xor_sync(0xffffffff, a, 2));
      const float high = fmaxf(maximum[row], a * scale);
      correction[row] = exp2_unit(maximum[row] - high);
      maximum[row] = high;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = exp2_unit(fmaf(s[i], scale, -maximum[i >> 1 & 1]));
    sums(s, t);
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] = sum[row] * correction[row] + t[row];
  }

  // Scores become weights under the maximum as it is; false, in all lanes alike, if it is too low for that.
  __device__ bool keep(float (&s)[KEYS / 2], float scale) {
    float t[2];
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = exp2_unit(fmaf(s[i], scale, -maximum[i >> 1 & 1]));
    sums(s, t);
    if (__any_sync(0xffffffff, !(t[0] <= LIMIT && t[1] <= LIMIT))) return false;
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] += t[row];
    return true;
  }
};

// The scores of a warp's 16 queries and a tile's keys once more, by the warp alone. q and k: tiles in shared memory, 128-byte swizzle.
template <class T> __device__ inline void scores_again(float (&s)[KEYS / 2], const uint8_t *q, const uint8_t *k) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 4;
  const auto word = [](const uint8_t *tile, int row, int byte) {
    return *reinterpret_cast<const uint32_t *>(tile + row * 128 + (byte ^ (row & 7) << 4));
  };
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) s[i] = 0;
#pragma unroll 1
  for (int i = 0; i < D / 16; ++i) {
    const int at = column + i * 32;
    const uint32_t a[4] = {word(q, row, at), word(q, row + 8, at), word(q, row, at + 16), word(q, row + 8, at + 16)};
#pragma unroll
    for (int block = 0; block < KEYS / 8; ++block) {
      const int key = block * 8 + threadIdx.x % 32 / 4;
      mma_16x8x16<T>(s + block * 4, a, word(k, key, at), word(k, key, at + 16));
    }
  }
}

} // namespace lcm::hopper
