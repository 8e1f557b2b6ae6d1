#pragma once
// Thin wrappers around the PTX of Hopper (sm_90a) that its matrix kernels are made of: barriers in shared memory
// (mbarrier), the tensor copy engine (TMA), warpgroup matrix products (wgmma), clusters, and register reallocation.
// Everything here is device code; include it from files whose kernels are empty below sm_90a.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace hopper {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- mbarrier: counts arrivals and bytes of one phase; the phase bit flips when both are complete ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives once and adds bytes that copies must bring before the phase completes.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives on the barrier at the same offset in block `rank` of the cluster (which may be this one).
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 remote;\n"
               "mapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank) : "memory");
}
__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
// Waits until the phase with this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef LCM_BOUNDED_SPINS // for tests: a lost arrival ends in an error instead of a hang
  for (int tries = 0; !barrier_try_wait(barrier, parity); ++tries)
    if (tries > 1 << 20) __trap();
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}
// Barrier number `id` (1..15) among the first `threads` threads that name it.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster; shared memory written before is visible to the others after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The address in block `rank`'s shared memory that corresponds to `address` in this block's.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ void store_cluster(uint32_t remote, float x, float y, float z, float w) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// Waits until the kernel before this one in the stream has ended, if this one was allowed to start early (programmatic stream serialization).
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- TMA: one thread starts the copy of a box; elements outside the tensor arrive as zeros ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void load_3d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void load_4d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// The same box to every block of the cluster whose bit is set in `blocks`, at the same offset; each block's own barrier
// (same offset) counts the bytes.
__device__ __forceinline__ void load_3d_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier, uint16_t blocks, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void load_4d_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier, uint16_t blocks, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// ---- wgmma ----

// Descriptor of an operand in shared memory. K-major with 128-byte swizzle (rows of 64 16-bit numbers): `leading` is
// ignored, `stride` = 1024, the bytes from 8 rows to the next 8. MN-major: `leading` = bytes from one block of 64 (128-byte
// swizzle) or 32 (64-byte swizzle) columns to the next, `stride` = bytes from 8 rows of K to the next 8.
enum Swizzle : uint32_t { kSwizzle128 = 1, kSwizzle64 = 2 };
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}
// Before the first product that reads registers written by ordinary instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// d (64, columns) = a (64, 16) b (16, columns) + (accumulate ? d : 0), f32 accumulators. Lane l of warp w holds rows 16 w + l / 4 (+ 8
// for the last two of four numbers) and columns 8 j + 2 (l % 4) + {0, 1} in d[4 j ..]. kTransposed: b is MN-major; kHalf: f16, else bf16.
template <int kColumns, bool kHalf, bool kTransposed> struct Wgmma;
#define LCM_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LCM_F32(i) LCM_F8(i), LCM_F8(i + 8), LCM_F8(i + 16), LCM_F8(i + 24)
// registers: the list "%0, .."; a, b, accumulate, transposed: the numbers of the operands that follow it.
#define LCM_WGMMA(columns, type, registers, a, b, accumulate, transposed)                                                      \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " a ", " b ", p, 1, 1, 0, " transposed ";\n}"
#define LCM_WGMMA_STRUCT(columns, registers, n0, n1, n2, n3, ...)                                                              \
  template <bool kHalf, bool kTransposed> struct Wgmma<columns, kHalf, kTransposed> {                                          \
    static __device__ __forceinline__ void run(float *d, uint64_t a, uint64_t b, int accumulate) {                             \
      if constexpr (kHalf)                                                                                                     \
        asm volatile(LCM_WGMMA(#columns, "f16", registers, n0, n1, n2, n3) : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed ? 1 : 0)); \
      else                                                                                                                     \
        asm volatile(LCM_WGMMA(#columns, "bf16", registers, n0, n1, n2, n3) : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed ? 1 : 0)); \
    }                                                                                                                          \
  };
#define LCM_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LCM_R64 LCM_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LCM_R80 LCM_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define LCM_R96 LCM_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LCM_R128 LCM_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
LCM_WGMMA_STRUCT(64, LCM_R32, "%32", "%33", "%34", "%35", LCM_F32(0))
LCM_WGMMA_STRUCT(128, LCM_R64, "%64", "%65", "%66", "%67", LCM_F32(0), LCM_F32(32))
LCM_WGMMA_STRUCT(160, LCM_R80, "%80", "%81", "%82", "%83", LCM_F32(0), LCM_F32(32), LCM_F8(64), LCM_F8(72))
LCM_WGMMA_STRUCT(192, LCM_R96, "%96", "%97", "%98", "%99", LCM_F32(0), LCM_F32(32), LCM_F32(64))
LCM_WGMMA_STRUCT(256, LCM_R128, "%128", "%129", "%130", "%131", LCM_F32(0), LCM_F32(32), LCM_F32(64), LCM_F32(96))
#undef LCM_R32
#undef LCM_R64
#undef LCM_R80
#undef LCM_R96
#undef LCM_R128
#undef LCM_WGMMA_STRUCT
#undef LCM_WGMMA
#undef LCM_F32
#undef LCM_F8

// ---- registers: a warpgroup gives some away, or takes some that were given away ----

template <int registers> __device__ __forceinline__ void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers> __device__ __forceinline__ void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }

#endif
} // namespace hopper
