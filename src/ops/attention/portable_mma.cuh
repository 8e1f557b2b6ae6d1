#pragma once
// Tiles of 16-bit numbers in shared memory, for the portable kernels of the matrix units: blocks of 4 warps, tiles of `D` columns of which the first
// head_dim (a multiple of 8) are real and the others zero. Rows are 16 bytes longer than their columns, so that the 8 rows `ldmatrix` reads at a time
// lie in different banks.
#include "mma.cuh"
#include "portable.cuh"

namespace portable {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
template <int D> constexpr int STRIDE = D + 8;

// Starts the copy of the rows from `first` on of a matrix of `rows` rows; those past its end become zeros.
template <typename T, int ROWS, int D>
__device__ __forceinline__ void copy_tile(T *tile, const void *matrix, int64_t offset, int64_t row_stride, int first, int rows, int columns) {
  const T *from = static_cast<const T *>(matrix) + offset;
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * D / 8; i += THREADS) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    const bool valid = first + row < rows && column < columns;
    mma::copy_16(tile + row * STRIDE<D> + column, valid ? from + (first + row) * row_stride + column : from, valid);
  }
}

// Writes a warp's 16 x D sums, each times the factor of its row (`low` for the rows of the first 8, `high` for the others), to the rows from `first` on
// of a matrix of `rows` rows, through 16 rows of shared memory that are this warp's own: 16 bytes a thread instead of 4.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const float (&sums)[D / 8][4], float low, float high, T *scratch, void *matrix, int64_t offset,
                                           int64_t row_stride, int first, int rows, int columns) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    T *to = scratch + lane / 4 * STRIDE<D> + n * 8 + lane % 4 * 2;
    *reinterpret_cast<uint32_t *>(to) = mma::pack<T>(sums[n][0] * low, sums[n][1] * low);
    *reinterpret_cast<uint32_t *>(to + 8 * STRIDE<D>) = mma::pack<T>(sums[n][2] * high, sums[n][3] * high);
  }
  __syncwarp();
  T *to = static_cast<T *>(matrix) + offset;
#pragma unroll 4
  for (int i = lane; i < 16 * D / 8; i += 32) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    if (first + row < rows && column < columns)
      *reinterpret_cast<uint4 *>(to + (first + row) * row_stride + column) = *reinterpret_cast<const uint4 *>(scratch + row * STRIDE<D> + column);
  }
}

// products (16 x N) = a (16 rows of D) b^T (N rows of D), both in shared memory.
template <typename T, int N, int D> __device__ __forceinline__ void dot_rows(float (&products)[N / 8][4], const T *a, const T *b) {
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) products[n][e] = 0.f;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t left[4];
    mma::load_a(left, a + k, STRIDE<D>);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t right[4];
      mma::load_b_of_rows(right, b + n * STRIDE<D> + k, STRIDE<D>);
      mma::multiply<T>(products[n / 8], left, right[0], right[1]);
      mma::multiply<T>(products[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

// sums (16 x D) += weights (16 x K, in the layout of sums, rounded to T) rows (K rows of D in shared memory).
template <typename T, int K, int D> __device__ __forceinline__ void add_weighted(float (&sums)[D / 8][4], const float (&weights)[K / 8][4], const T *rows) {
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    const uint32_t left[4] = {mma::pack<T>(weights[2 * k][0], weights[2 * k][1]), mma::pack<T>(weights[2 * k][2], weights[2 * k][3]),
                              mma::pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]), mma::pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t right[4];
      mma::load_b_of_columns(right, rows + k * 16 * STRIDE<D> + n, STRIDE<D>);
      mma::multiply<T>(sums[n / 8], left, right[0], right[1]);
      mma::multiply<T>(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

} // namespace portable
