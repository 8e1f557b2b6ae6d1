// Hopper's asynchronous machinery as one-line functions: mbarriers, tensor-map copies, warpgroup matrix products, register hand-over.
// What each instruction does is in the PTX ISA; here stand only the forms that the attention kernels use.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace lcm::hopper {

__device__ inline uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------
__device__ inline void barrier_init(uint64_t *b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint64_t *b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ inline void barrier_expect(uint64_t *b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ inline bool barrier_try(uint64_t *b, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  return done;
}
__device__ inline void barrier_wait(uint64_t *b, uint32_t parity) {
  while (!barrier_try(b, parity)) {}
}
// Hardware barrier ID for `threads` threads; arrive does not wait. The number must be known to the compiler: of barriers
// numbered at run time it assumes all 16, and with them it gives up the registers that setmaxnreg brings.
template <int ID> __device__ inline void named_sync(int threads) { asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory"); }
template <int ID> __device__ inline void named_arrive(int threads) { asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(threads) : "memory"); }

// ---- tensor-map copies ----------------------------------------------------------------------------------------------
__device__ inline void prefetch_map(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
__device__ inline void load_box(void *to, const CUtensorMap *map, uint64_t *b, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// ---- registers ------------------------------------------------------------------------------------------------------
template <int N> __device__ inline void registers_raise() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ inline void registers_lower() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- warpgroup matrix products --------------------------------------------------------------------------------------
// Descriptor of an operand in shared memory whose rows are 128 bytes with the 128-byte swizzle, groups of 8 rows 1024 bytes apart.
// Along K of a K-major operand a step of 16 numbers is 32 bytes; along K of an MN-major one of 64 wide it is 16 rows, 2048 bytes.
__device__ inline uint64_t describe(const void *p) {
  return (uint64_t)((shared_address(p) & 0x3FFFF) >> 4) | (uint64_t)64 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of accumulators over a fence or a wait.
template <int N> __device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ inline void pin(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define LCM_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LCM_F32(d, i) LCM_F8(d, i), LCM_F8(d, i + 8), LCM_F8(d, i + 16), LCM_F8(d, i + 24)
#define LCM_P32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LCM_P64 LCM_P32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64 x 128) = [d +] A (64 x 16, shared, K-major) B^T (128 x 16, shared, K-major).
#define LCM_SS(T) asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." T "." T " {" LCM_P64 "}, %64, %65, p, 1, 1, 0, 0;\n}" \
                               : LCM_F32(d, 0), LCM_F32(d, 32) : "l"(a), "l"(b), "r"(accumulate))
template <class T> __device__ inline void wgmma_64x128_shared(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) LCM_SS("f16");
  else LCM_SS("bf16");
}
// d (64 x 64) += A (64 x 16, registers) B (16 x 64, shared, MN-major).
#define LCM_RS(T) asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." T "." T " {" LCM_P32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" \
                               : LCM_F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <class T> __device__ inline void wgmma_64x64_registers(float (&d)[32], const uint32_t *a, uint64_t b) {
  if constexpr (__is_same(T, __half)) LCM_RS("f16");
  else LCM_RS("bf16");
}

// The same by one warp: d (16 x 8) += A (16 x 16) B^T (8 x 16), all in registers.
#define LCM_MMA(T) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." T "." T ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T> __device__ inline void mma_16x8x16(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, __half)) LCM_MMA("f16");
  else LCM_MMA("bf16");
}

} // namespace lcm::hopper
