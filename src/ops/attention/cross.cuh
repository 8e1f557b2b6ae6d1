#pragma once
// Pieces of the cross-attention kernels: few keys (text and image tokens), many queries, head_dim 64, 16-bit tensors. What such a call costs is the memory
// its queries and outputs move, so each is read or written once, 16 bytes a thread, straight between global memory and the registers of the matrix units.
//
// Those registers hold of a row the pairs at columns 2t, 2t + 8, .. (t = lane % 4), while a thread that reads 16 bytes has eight columns in a row. Products
// do not mind the order of the index they sum over, nor a matrix the order of its columns, as long as both operands agree; so the columns of all matrices
// are renumbered: place 8 (4 h + j) + 2 t + e stands for column 32 h + 8 t + 2 j + e. Queries, dout and outputs get that numbering from the way threads
// read and write them, keys and values once they are in shared memory.
#include "portable_mma.cuh"

namespace cross {

using portable::STRIDE;
using portable::THREADS;
using portable::tiles_of;
using portable::WARPS;

constexpr int D = 64, ROWS = 16; // of a tile of queries: one warp's
constexpr int STAGES = 2;        // tiles of queries on their way to a warp (three were slower)

// Starts the copy of `rows` rows of keys or values to shared memory, with zeros behind them up to GROUPS * 16.
template <typename T, int GROUPS> __device__ __forceinline__ void copy_keys(T *tile, const void *matrix, int64_t offset, int64_t row_stride, int rows) {
  const T *from = static_cast<const T *>(matrix) + offset;
#pragma unroll
  for (int i = threadIdx.x; i < GROUPS * 16 * D / 8; i += THREADS)
    mma::copy_16(tile + i / 8 * STRIDE<D> + i % 8 * 8, i / 8 < rows ? from + i / 8 * row_stride + i % 8 * 8 : from, i / 8 < rows);
}

// Renumbers the columns of GROUPS * 16 rows in shared memory, in place: each thread the 16 bytes it has copied there, which must have arrived. The four
// threads that exchange their bytes are of one warp.
template <typename T, int GROUPS> __device__ __forceinline__ void renumber(T *tile) {
#pragma unroll 4
  for (int i = threadIdx.x; i < GROUPS * 16 * D / 8; i += THREADS) {
    T *row = tile + i / 8 * STRIDE<D> + i % 8 / 4 * 32;
    const uint4 x = *reinterpret_cast<const uint4 *>(row + i % 4 * 8);
    __syncwarp();
    uint32_t *to = reinterpret_cast<uint32_t *>(row) + i % 4;
    to[0] = x.x, to[4] = x.y, to[8] = x.z, to[12] = x.w;
  }
}

// A thread's share of 16 rows of 64 numbers, as operands of the matrix units.
struct Operand {
  uint32_t r[4][4]; // [16 places][as multiply() wants them]
};

// Where the 16 bytes are that a thread reads or writes of a tile: part i of 4.
__device__ __forceinline__ int part_row(int i) { return threadIdx.x % 32 / 4 + i % 2 * 8; }
__device__ __forceinline__ int part_column(int i) { return i / 2 * 32 + threadIdx.x % 4 * 8; }

// Copies a thread's share of a tile to four slots that are its own; rows past the end become zeros.
template <typename T> __device__ __forceinline__ void copy_rows(uint4 *slots, const T *from, int64_t row_stride, int first, int rows) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool valid = first + part_row(i) < rows;
    mma::copy_16(slots + i * 32 + threadIdx.x % 32, valid ? from + (first + part_row(i)) * row_stride + part_column(i) : from, valid);
  }
}
__device__ __forceinline__ Operand read_rows(const uint4 *slots) {
  Operand x;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 part = slots[i * 32 + threadIdx.x % 32];
    x.r[i / 2 * 2][i % 2] = part.x, x.r[i / 2 * 2][i % 2 + 2] = part.y;
    x.r[i / 2 * 2 + 1][i % 2] = part.z, x.r[i / 2 * 2 + 1][i % 2 + 2] = part.w;
  }
  return x;
}
template <typename T> __device__ __forceinline__ void write_rows(const float (&sums)[D / 8][4], T *to, int64_t row_stride, int first, int rows) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t part[4];
#pragma unroll
    for (int j = 0; j < 4; j++) part[j] = mma::pack<T>(sums[i / 2 * 4 + j][i % 2 * 2], sums[i / 2 * 4 + j][i % 2 * 2 + 1]);
    if (first + part_row(i) < rows)
      *reinterpret_cast<uint4 *>(to + (first + part_row(i)) * row_stride + part_column(i)) = uint4{part[0], part[1], part[2], part[3]};
  }
}

// products (16 x 16 GROUPS) = rows keys^T. Neighbouring products do not wait for each other.
template <typename T, int GROUPS> __device__ __forceinline__ void dot_keys(float (&products)[2 * GROUPS][4], const Operand &rows, const T *keys) {
#pragma unroll
  for (int n = 0; n < 2 * GROUPS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) products[n][e] = 0.f;
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
      uint32_t right[4];
      mma::load_b_of_rows(right, keys + n * 16 * STRIDE<D> + k * 16, STRIDE<D>);
      mma::multiply<T>(products[2 * n], rows.r[k], right[0], right[1]);
      mma::multiply<T>(products[2 * n + 1], rows.r[k], right[2], right[3]);
    }
}

// sums (16 x 64) += weights (16 x 16 GROUPS, packed as `products` are laid out) rows.
template <typename T, int GROUPS>
__device__ __forceinline__ void add_weighted(float (&sums)[D / 8][4], const uint32_t (&weights)[2 * GROUPS][2], const T *rows) {
#pragma unroll
  for (int k = 0; k < GROUPS; k++) {
    const uint32_t left[4] = {weights[2 * k][0], weights[2 * k][1], weights[2 * k + 1][0], weights[2 * k + 1][1]};
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t right[4];
      mma::load_b_of_columns(right, rows + k * 16 * STRIDE<D> + n, STRIDE<D>);
      mma::multiply<T>(sums[n / 8], left, right[0], right[1]);
      mma::multiply<T>(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The tiles of queries of a block: blocks along x share them out evenly.
struct Share {
  int begin, end;
  __device__ explicit Share(int tokens) {
    const int64_t tiles = tiles_of(tokens, ROWS);
    begin = static_cast<int>(tiles * blockIdx.x / gridDim.x), end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  }
};

// Into how many blocks to cut the queries of a head, given how many blocks run at once on a multiprocessor: the number that ends first when every warp takes
// one unit of time a tile, and a block two more to begin with.
inline int shares(const LcmAttention &a, int blocks_at_once) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t tiles = tiles_of(a.tokens, ROWS), heads = static_cast<int64_t>(a.heads) * a.batch;
  const int64_t slots = static_cast<int64_t>(processors) * blocks_at_once;
  int64_t best = 1, best_time = INT64_MAX;
  for (int64_t n = 1; n <= tiles && n <= 64; n++) {
    const int64_t waves = (n * heads + slots - 1) / slots, rounds = ((tiles + n - 1) / n + WARPS - 1) / WARPS;
    if (waves * (rounds + 2) < best_time) best = n, best_time = waves * (rounds + 2);
  }
  return static_cast<int>(best);
}

// Whether these kernels take the call.
inline bool is_supported(const LcmAttention &a) {
  return portable::is_supported(a) && portable::suits_matrix_units(a) && a.head_dim == D && !a.causal && a.own_tokens >= 1 && a.own_tokens <= 128 &&
         (a.k2 == nullptr || (a.reference_tokens >= 1 && a.reference_tokens <= 128));
}

// The instance made for SDXL (77 text tokens, up to 16 image tokens), else one for any numbers up to 128.
inline bool is_small(const LcmAttention &a) { return a.own_tokens <= 80 && (a.k2 == nullptr || a.reference_tokens <= 16); }

} // namespace cross
