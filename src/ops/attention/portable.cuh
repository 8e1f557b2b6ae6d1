#pragma once
// What the portable attention kernels share: where the keys of a tile come from, and how a launcher picks between the two families of kernels
// (16-bit operands through the matrix units; anything else through f32 arithmetic).
#include "../elements.cuh"
#include "attention.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace portable {

enum DType { F32 = 0, BF16 = 1, F16 = 2 };

__host__ __device__ inline int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }

__device__ inline bool sees_reference(const LcmAttention &a, int sample) {
  return a.k2 != nullptr && (a.use_reference == nullptr || a.use_reference[sample] != 0);
}

// A tile of keys and values, own or of the reference, seen as rows of one matrix each: `first` is the tile's first row, `rows` the matrix' length.
// Offsets count elements and include the head's.
struct Keys {
  const void *k, *v;
  int64_t k_offset, v_offset, k_row, v_row;
  int first, rows;
  bool own;
};

// The tile of this index, the own ones counted first, for one sample and head.
__device__ inline Keys keys_of_tile(const LcmAttention &a, int index, int tile, int sample, int head) {
  const int own_tiles = tiles_of(a.own_tokens, tile);
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  if (index < own_tiles)
    return {a.k, a.v, sample * a.k_batch + column, sample * a.v_batch + column, a.k_row, a.v_row, index * tile, a.own_tokens, true};
  const int64_t from = a.reference_batch == 1 ? 0 : sample;
  return {a.k2,    a.v2,    from * a.k2_batch + column,   from * a.v2_batch + column,
          a.k2_row, a.v2_row, (index - own_tiles) * tile, a.reference_tokens, false};
}

// The tiles a tile of queries looks at: in causal attention none that lies wholly after `last_query`; the reference's come last. Returns how many;
// `index_of_visible_tile` says which.
struct VisibleTiles {
  int own, own_all, all;
  __device__ VisibleTiles(const LcmAttention &a, int tile, int last_query, int sample) {
    own_all = tiles_of(a.own_tokens, tile);
    own = a.causal ? min(own_all, last_query / tile + 1) : own_all;
    all = own + (sees_reference(a, sample) ? tiles_of(a.reference_tokens, tile) : 0);
  }
  __device__ int index(int i) const { return i < own ? i : i - own + own_all; }
};

// One number of a tensor of any of the three types.
__device__ inline float load(const void *data, int64_t i, int dtype) {
  if (dtype == F32) return static_cast<const float *>(data)[i];
  if (dtype == BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[i]);
  return __half2float(static_cast<const __half *>(data)[i]);
}
__device__ inline void store(void *data, int64_t i, int dtype, float x) {
  if (dtype == F32) static_cast<float *>(data)[i] = x;
  else if (dtype == BF16) static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16(x);
  else static_cast<__half *>(data)[i] = __float2half(x);
}

inline bool in_sixteens(const void *data, int64_t row, int64_t batch) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % 8 == 0 && batch % 8 == 0;
}

// Whether the matrix units' kernels take these tensors: they copy 16 bytes at a time.
inline bool suits_matrix_units(const LcmAttention &a) {
  return a.dtype != F32 && a.head_dim % 8 == 0 && a.head_dim <= 128 && in_sixteens(a.q, a.q_row, a.q_batch) &&
         in_sixteens(a.k, a.k_row, a.k_batch) && in_sixteens(a.v, a.v_row, a.v_batch) && in_sixteens(a.out, a.out_row, a.out_batch) &&
         (a.k2 == nullptr || (in_sixteens(a.k2, a.k2_row, a.k2_batch) && in_sixteens(a.v2, a.v2_row, a.v2_batch)));
}

// Whether any of the portable kernels takes this call.
inline bool is_supported(const LcmAttention &a) {
  return a.dtype >= F32 && a.dtype <= F16 && a.head_dim >= 1 && a.head_dim <= 256 && a.heads <= 65535 && a.batch <= 65535 &&
         (a.k2 == nullptr || a.reference_batch == 1 || a.reference_batch == a.batch);
}

// Launches a kernel that takes its one argument by value; blocks may need more shared memory than is to be had without asking.
// `dependent`: the kernel waits for the one before it itself (dependent_launch.cuh).
template <typename A>
int launch(void (*kernel)(const A), dim3 grid, dim3 threads, size_t shared, const A &argument, cudaStream_t stream, bool dependent = false) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (shared > 48 * 1024) {
    int device, limit;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess && shared > static_cast<size_t>(limit)) return -1;
    if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  if (dependent) return lcm::launch_dependent(kernel, grid, threads, shared, stream, argument);
  kernel<<<grid, threads, shared, stream>>>(argument);
  return cudaGetLastError();
}

} // namespace portable
