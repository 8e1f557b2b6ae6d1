// What the kernels of the backward pass share: their arguments, the layout of the scratch memory, and small pieces of register arithmetic.
#pragma once
#include "attention.h"
#include "hopper_ptx.cuh"

namespace lcm::backward {
using namespace lcm::hopper;

constexpr int kTile = 128;                         // queries or keys of a tile
constexpr int kDim = 64;                           // head_dim
constexpr int kTileBytes = kTile * kDim * 2;       // one tile of q, k, v or dout
constexpr int kStatisticsBytes = kTile * 2 * 4;    // of one query tile: 128 x lse * log2(e), then 128 x D
constexpr int kThreads = 384;                      // one warpgroup that loads, two that compute

// Tensor maps (64, heads, tokens, batch) with boxes of (64, 1, 128, 1): rows past the last token read as zero.
struct Maps { CUtensorMap q, dout, k, v, k2, v2; };

struct Gradient { void *data; int64_t row, batch; };

struct Arguments {
  int *next_item;                // of the key kernel's queue
  float *statistics;             // (batch * heads, query tiles, 2, 128)
  float *dq_sum;                 // (batch * heads, query tiles, 8 warps, 8, 32 lanes, 4): the f32 sum of dq in the order of wgmma's registers; null without
  const uint8_t *use_reference;
  Gradient dq, dk, dv, dk2, dv2;
  int batch, heads, tokens, own_tokens, reference_tokens, reference_batch;
  int query_tiles, own_tiles, reference_tiles; // tiles of the keys whose gradient (key kernel) or whose part in dq (query kernel) is computed
  int after_queries;             // the key kernel was launched behind the query kernel, whose results it does not need
  int keys_follow;               // the key kernel will be launched behind the query kernel
  int reference_items, items;    // key kernel: (key tile, head, sample) triples of the reference, and of both sources
  float scale;
  __device__ bool uses_reference(int b) const { return !use_reference || use_reference[b]; }
};

constexpr float kLog2e = 1.4426950408889634f;
__device__ inline float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// A plain stretch of global memory to shared memory.
__device__ inline void load_bytes(void *to, const void *from, uint32_t bytes, uint64_t *b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Makes this thread's stores to shared memory visible to the tensor cores.
__device__ inline void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Programmatic dependent launch: a kernel launched behind another may begin once all blocks of that one have said so or ended, and sees what it wrote after the wait.
// Only a kernel whose successor is launched here too may let it: a library's kernel may start early as well, and not wait (dependent_launch.cuh).
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_earlier_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Adds numbers in shared memory to global memory. Before the former are overwritten, and before the kernel ends, their copies must be done.
__device__ inline void add_bytes(float *to, const void *from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}
__device__ inline void bulk_reads_done() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void bulk_writes_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <class T> __device__ inline uint32_t pack(float low, float high) {
  uint32_t d;
  if constexpr (__is_same(T, __half)) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Writes one warp's 16 rows of a (64 x 64) accumulator, times `factor`, to rows of 64 numbers. The four lanes of a row trade words so that each
// holds 8 neighbours and stores 16 bytes. `rows` of the 16 exist.
template <class T> __device__ inline void store_rows(const float (&d)[32], float factor, T *to, int64_t stride, int rows, int lane) {
  const int q = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      uint32_t r[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) r[t] = pack<T>(d[(group * 4 + t) * 4 + half * 2] * factor, d[(group * 4 + t) * 4 + half * 2 + 1] * factor);
#pragma unroll
      for (int t = 0; t < 4; t += 2) {
        const uint32_t got = __shfl_xor_sync(~0u, q & 1 ? r[t] : r[t + 1], 1);
        if (q & 1) r[t] = got; else r[t + 1] = got;
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t got = __shfl_xor_sync(~0u, q & 2 ? r[t] : r[t + 2], 2);
        if (q & 2) r[t] = got; else r[t + 2] = got;
      }
      if (row < rows) *reinterpret_cast<uint4 *>(to + row * stride + (group * 4 + q) * 8) = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
}

// d (64 x 64) = [d +] A (64 x 16) B (16 x 64), both in shared memory with the outer index (of 64) contiguous.
#define LCM_SS_MN(T) asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." T "." T " {" LCM_P32 "}, %32, %33, p, 1, 1, 1, 1;\n}" \
                                  : LCM_F32(d, 0) : "l"(a), "l"(b), "r"(accumulate))
template <class T> __device__ inline void wgmma_64x64_shared_mn(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (__is_same(T, __half)) LCM_SS_MN("f16");
  else LCM_SS_MN("bf16");
}

// d (64 x 128) = A (64 rows of 64) B^T (128 rows of 64): the scores or their gradients of one warpgroup.
template <class T> __device__ inline void multiply_rows(float (&d)[64], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_64x128_shared<T>(d, a + k * 2, b + k * 2, k != 0); // 16 numbers are 32 bytes
}
// d (64 x 64) += A (64 x 128, registers) B (128 rows of 64).
template <class T> __device__ inline void multiply_packed(float (&d)[32], const uint32_t (&a)[32], uint64_t b) {
#pragma unroll
  for (int k = 0; k < 8; ++k) wgmma_64x64_registers<T>(d, a + k * 4, b + k * 128); // 16 rows are 2048 bytes
}

} // namespace lcm::backward
