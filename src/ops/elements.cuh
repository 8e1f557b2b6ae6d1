// What the memory-bound kernels share: 16-byte accesses, the choice of the element type, pointwise maps.
//
// All of them are bound by memory, so each thread moves 16 bytes at a time (a `Pack`) where the addresses and the
// number
// of channels allow, and single elements otherwise; everything is computed in f32 in registers.
#pragma once
#include "dependent_launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace lcm {

// V adjacent elements, moved by accesses of at most 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T values[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T *from) {
  return *reinterpret_cast<const Pack<T, V> *>(from);
}

template <int V, class T>
__device__ __forceinline__ void to_floats(const Pack<T, V> &pack, float (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = static_cast<float>(pack.values[i]);
}

template <int V, class T>
__device__ __forceinline__ void load(const T *from, float (&values)[V]) {
  to_floats<V>(load_pack<V>(from), values);
}

template <int V, class T>
__device__ __forceinline__ void store(T *to, const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.values[i] = T(values[i]);
  *reinterpret_cast<Pack<T, V> *>(to) = pack;
}

// The value as the type T keeps it.
template <class T>
__device__ __forceinline__ float rounded(float value) {
  return static_cast<float>(T(value));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// An element type and how many of them a thread moves at a time.
template <class T, int V>
struct Kind {
  using type = T;
  static constexpr int width = V;
};

// Elements in 16 bytes of a dtype (0 = f32, 1 = bf16, 2 = f16).
inline int wide(int dtype) { return dtype == 0 ? 4 : 8; }

template <class... P>
bool aligned(const P *...pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls `f` with the Kind of a dtype code, of 16 bytes where `vectorised`; -1 for an unknown code.
template <class F>
int dispatch(int dtype, bool vectorised, F f) {
  switch (dtype) {
    case 0: return vectorised ? f(Kind<float, 4>{}) : f(Kind<float, 1>{});
    case 1: return vectorised ? f(Kind<__nv_bfloat16, 8>{}) : f(Kind<__nv_bfloat16, 1>{});
    case 2: return vectorised ? f(Kind<__half, 8>{}) : f(Kind<__half, 1>{});
    default: return -1;
  }
}

inline int launched() { return static_cast<int>(cudaGetLastError()); }

// Multiprocessors of the current device (of the first one asked about: machines mix no kinds).
inline int multiprocessors() {
  static int cached = 0; // set by an atomic store: a guarded initialiser would need the C++ runtime library
  int count = __atomic_load_n(&cached, __ATOMIC_RELAXED);
  if (count == 0) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1)
      count = 1;
    __atomic_store_n(&cached, count, __ATOMIC_RELAXED);
  }
  return count;
}

template <class A>
constexpr A divide_up(A a, A b) {
  return (a + b - 1) / b;
}

constexpr int kMapThreads = 256;

// Applies `f.at<V>(i)` to every pack of `count` elements, and `f.at<1>(i)` to those after the last whole pack.
template <int V, class F>
__global__ void __launch_bounds__(kMapThreads) map_kernel(F f, int64_t count) {
  wait_for_previous();
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * V;
  if (i + V <= count) {
    f.template at<V>(i);
  } else if constexpr (V > 1) {
    for (; i < count; ++i) f.template at<1>(i);
  }
}

// Launches it. -1 where the packs are more than 32 bits count (functors index packs with 32 bits).
template <int V, class F>
int map(F f, int64_t count, cudaStream_t stream) {
  if (count <= 0) return count == 0 ? 0 : -1;
  int64_t packs = divide_up<int64_t>(count, V);
  if (packs > 0xffffffffll) return -1;
  unsigned blocks = static_cast<unsigned>(divide_up<int64_t>(packs, kMapThreads));
  return launch_dependent(map_kernel<V, F>, blocks, kMapThreads, 0, stream, f, count);
}

// Splits the index of an element into row and column, for rows of `columns` elements that are whole packs of V.
template <int V>
__device__ __forceinline__ void split_index(int64_t i, unsigned columns, int64_t &row, unsigned &column) {
  unsigned pack = static_cast<unsigned>(i / V), packs = columns / V;
  unsigned r = pack / packs;
  row = r;
  column = (pack - r * packs) * V;
}

} // namespace lcm
