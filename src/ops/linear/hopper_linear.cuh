#pragma once
// What the kernels of linear layers on Hopper share: tiles of 128 rows, their order, small wrappers.
#include "linear.h"

#include "../hopper_gemm.h"
#include "../hopper.cuh"

namespace hopper_linear {
using namespace hopper;

constexpr int kRows = 128, kDepth = 64; // of a tile; of a step along K: 128 bytes, the width of the swizzle
constexpr int kThreads = 384;           // three warpgroups
constexpr int kGroup = 8;               // tiles of rows that are walked together with all columns, for the second-level cache

struct Product {
  CUtensorMap x, weight;
  const void *bias, *residual;
  void *y;
  int rows, columns, steps; // of y; of 64 numbers of K
  int tiles_m, tiles_n, tiles;
};

// Launches the gated kernel (hopper_gated.cu) for arguments that have been checked. Returns a cudaError_t, or -1.
int launch_gated(const LcmLinear *arguments, int multiprocessors, cudaStream_t stream);

// Fills in all but the tiles along the columns, whose number follows from their width, and starts `kernel` with as many blocks as there
// are multiprocessors. `box`: rows of the weight that a copy brings. `ready`: the kernel's own, one a device.
template <bool kHalf>
int launch(void (*kernel)(const Product), const LcmLinear *c, int width, int box, int bytes, bool (&ready)[64], int multiprocessors, cudaStream_t stream) {
  Product p = {};
  const int64_t sizes[2] = {c->inner, c->rows}, weight_sizes[2] = {c->inner, c->gated ? 2ll * c->columns : c->columns}, strides[1] = {c->inner};
  const int x_box[2] = {kDepth, kRows}, weight_box[2] = {kDepth, box};
  if (!hopper_gemm::encode(&p.x, kHalf, 2, c->x, sizes, strides, x_box) || !hopper_gemm::encode(&p.weight, kHalf, 2, c->weight, weight_sizes, strides, weight_box)) return -1;
  p.bias = c->bias, p.residual = c->residual, p.y = c->y, p.rows = c->rows, p.columns = c->columns, p.steps = (c->inner + kDepth - 1) / kDepth;
  p.tiles_m = (c->rows + kRows - 1) / kRows, p.tiles_n = (c->columns + width - 1) / width, p.tiles = p.tiles_m * p.tiles_n;
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return -1;
  if (!__atomic_load_n(&ready[device], __ATOMIC_ACQUIRE)) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) return cudaGetLastError();
    __atomic_store_n(&ready[device], true, __ATOMIC_RELEASE);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(min(p.tiles, multiprocessors)), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1; // its prologue may overlap the end of the kernel before
  config.attrs = &early, config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, p);
  return cudaGetLastError();
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void load_2d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
// Arrives at a named barrier without waiting there.
__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "r"(from));
  return words;
}

// Barriers of a ring of stages: `full` completes with the bytes of a stage, `empty` with an arrival of each of its readers.
template <int kStages> __device__ __forceinline__ void start_ring(const Product &p, uint32_t full, uint32_t empty, int readers) {
  if (threadIdx.x == 0) {
    if (full & 7) __trap();
    for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, readers);
    barrier_init_fence();
    prefetch_map(&p.x);
    prefetch_map(&p.weight);
  }
  wait_for_previous_kernel(); // nothing before this line touches its results
  __syncthreads();
}

struct Tile {
  int m, n;
};
__device__ __forceinline__ Tile locate(const Product &p, int index) {
  int group = index / (kGroup * p.tiles_n), inside = index - group * kGroup * p.tiles_n;
  int height = min(kGroup, p.tiles_m - group * kGroup);
  return {group * kGroup + inside % height, inside / height};
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
// The producer: one thread that keeps the stages filled, tile by tile, with 128 rows of x and twice `kBox` of the weight: those at
// `width` times the tile's number, and those `second` rows behind them.
template <int kStages, int kBox> __device__ __forceinline__ void produce(const Product &p, uint32_t stages, uint32_t full, uint32_t empty, int width, int second) {
  constexpr int kA = kRows * kDepth * 2, kB = kBox * kDepth * 2, kStage = kA + 2 * kB;
  int stage = 0;
  uint32_t parity = 1;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = locate(p, index);
    for (int step = 0; step < p.steps; ++step) {
      const uint32_t a = stages + stage * kStage, b = a + kA, ready = full + 8 * stage;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(ready, kStage);
      load_2d(a, &p.x, ready, step * kDepth, tile.m * kRows);
      load_2d(b, &p.weight, ready, step * kDepth, tile.n * width);
      load_2d(b + kB, &p.weight, ready, step * kDepth, tile.n * width + second);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

#endif

} // namespace hopper_linear
