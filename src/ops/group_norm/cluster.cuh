// Thread block clusters (Hopper): their barrier, and reads of a peer's shared memory. Empty on devices without them.
#pragma once
#include <stdint.h>

namespace lcm {

// The two halves of the barrier. Writes to shared memory before `arrive` are seen by peers after `wait`.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The float2 that the block of this rank holds where this block holds `*own`.
__device__ __forceinline__ float2 read_peer(const float2 *own, int rank) {
  float2 value = make_float2(0.0f, 0.0f);
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own)), peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(peer) : "memory");
#endif
  return value;
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; the thread sees it after `wait_copies` of its batch.
template <int bytes>
__device__ __forceinline__ void start_copy(void *to, const void *from) {
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void end_batch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of the latest batches are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

} // namespace lcm
