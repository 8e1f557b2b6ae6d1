#pragma once
// Tiles of f32 numbers in shared memory, for the portable kernels that take any type, any head_dim up to 256 and any stride: blocks of 16 x 16 threads,
// tiles of ROWS = 16 R rows and COLUMNS = 16 C columns of which the first head_dim are real and the others zero.
// Thread (y, x) owns of a product of two tiles the rows y + 16 i and the columns x + 16 j: rows read along their columns, 4 at a time, by neighbouring x lie
// in different banks because rows are 4 numbers longer than their columns.
#include "mma.cuh"
#include "portable.cuh"

namespace portable {

constexpr int SIDE = 16;

template <int R_, int C_> struct Fma {
  static constexpr int R = R_, C = C_, ROWS = SIDE * R, COLUMNS = SIDE * C, STRIDE = COLUMNS + 4, WEIGHT_STRIDE = ROWS + 16;
  static constexpr int TILE_SIZE = ROWS * STRIDE, WEIGHTS_SIZE = ROWS * WEIGHT_STRIDE;
  static constexpr int V = C < 4 ? C : 4;      // columns a thread reads at once
  static constexpr int STAGES = C <= 2 ? 2 : 1; // steps of the gradients' loops in shared memory, where two blocks still fit a multiprocessor

  // The column of a ROWS x COLUMNS sum that this thread's element c belongs to.
  static __device__ int column(int c) { return c / V * SIDE * V + threadIdx.x * V + c % V; }
  static __device__ int row(int i) { return threadIdx.y + SIDE * i; }

  // Starts the copy of the rows from `first` on of a matrix of `rows` rows; those past its end become zeros. Tensors of f32 `in_fours` are copied behind the
  // arithmetic's back, others at once.
  static __device__ __forceinline__ void copy_tile(float *tile, const void *matrix, int64_t offset, int64_t row_stride, int first, int rows, int columns,
                                                   int dtype, bool in_fours) {
    const int thread = threadIdx.y * SIDE + threadIdx.x;
    if (in_fours) {
      const float *from = static_cast<const float *>(matrix) + offset;
#pragma unroll 4
      for (int i = thread; i < ROWS * COLUMNS / 4; i += SIDE * SIDE) {
        const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
        const bool valid = first + r < rows && c < columns;
        mma::copy_16(tile + r * STRIDE + c, valid ? from + (first + r) * row_stride + c : from, valid);
      }
    } else {
      for (int i = thread; i < ROWS * COLUMNS; i += SIDE * SIDE) {
        const int r = i / COLUMNS, c = i % COLUMNS;
        tile[r * STRIDE + c] = first + r < rows && c < columns ? load(matrix, offset + (first + r) * row_stride + c, dtype) : 0.f;
      }
    }
  }

  static __device__ void store_tile(const float (&sums)[R][C], const float (&factors)[R], void *matrix, int64_t offset, int64_t row_stride, int first,
                                    int rows, int columns, int dtype) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int c = 0; c < C; c++)
        if (first + row(i) < rows && column(c) < columns)
          store(matrix, offset + (first + row(i)) * row_stride + column(c), dtype, sums[i][c] * factors[i]);
  }

  // products (ROWS x ROWS) = a b^T.
  static __device__ void dot_rows(float (&products)[R][R], const float *a, const float *b) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++) products[i][j] = 0.f;
#pragma unroll 2
    for (int d = 0; d < COLUMNS; d += 4) {
      float4 left[R], right[R];
#pragma unroll
      for (int i = 0; i < R; i++) {
        left[i] = *reinterpret_cast<const float4 *>(a + row(i) * STRIDE + d);
        right[i] = *reinterpret_cast<const float4 *>(b + (threadIdx.x + SIDE * i) * STRIDE + d);
      }
#pragma unroll
      for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++) {
          products[i][j] = fmaf(left[i].x, right[j].x, products[i][j]);
          products[i][j] = fmaf(left[i].y, right[j].y, products[i][j]);
          products[i][j] = fmaf(left[i].z, right[j].z, products[i][j]);
          products[i][j] = fmaf(left[i].w, right[j].w, products[i][j]);
        }
    }
  }

  // sums (ROWS x COLUMNS) += weights (ROWS x ROWS) rows (ROWS x COLUMNS). The weights pass through `scratch`, whose rows are shared only by the 16 threads
  // that own them: half a warp.
  static __device__ void add_weighted(float (&sums)[R][C], const float (&weights)[R][R], const float *rows, float *scratch) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++) scratch[row(i) * WEIGHT_STRIDE + threadIdx.x + SIDE * j] = weights[i][j];
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < ROWS; k += 4) {
      float left[R][4];
#pragma unroll
      for (int i = 0; i < R; i++) read<4>(left[i], scratch + row(i) * WEIGHT_STRIDE + k);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float right[C];
#pragma unroll
        for (int c = 0; c < C; c += V) read<V>(right + c, rows + (k + n) * STRIDE + column(c));
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
          for (int c = 0; c < C; c++) sums[i][c] = fmaf(left[i][n], right[c], sums[i][c]);
      }
    }
  }

  // exp(x) for x <= 0, to about 2e-7 of 1: exact enough near 0, where the weights are that count.
  static __device__ __forceinline__ float exponential(float x) { return mma::exp2_fast(x * mma::LOG2_E); }

private:
  template <int N> static __device__ void read(float *to, const float *from) {
    if constexpr (N == 4) {
      const float4 x = *reinterpret_cast<const float4 *>(from);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else if constexpr (N == 2) {
      const float2 x = *reinterpret_cast<const float2 *>(from);
      to[0] = x.x, to[1] = x.y;
    } else {
      to[0] = from[0];
    }
  }
};

inline bool in_fours(const void *data, int64_t row, int64_t batch) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % 4 == 0 && batch % 4 == 0;
}
// Whether the inputs of a call are f32 that can be copied four at a time.
inline bool in_fours(const LcmAttention &a) {
  return a.dtype == F32 && a.head_dim % 4 == 0 && in_fours(a.q, a.q_row, a.q_batch) && in_fours(a.k, a.k_row, a.k_batch) &&
         in_fours(a.v, a.v_row, a.v_batch) &&
         (a.k2 == nullptr || (in_fours(a.k2, a.k2_row, a.k2_batch) && in_fours(a.v2, a.v2_row, a.v2_batch)));
}

// Calls `f` with the tiles that fit a head_dim up to 256: small enough for two blocks and more to share a multiprocessor.
template <typename F> int with_fma_tiles(int head_dim, F f) {
  if (head_dim <= 16) return f(Fma<4, 1>());
  if (head_dim <= 32) return f(Fma<4, 2>());
  if (head_dim <= 64) return f(Fma<4, 4>());
  if (head_dim <= 128) return f(Fma<2, 8>());
  return f(Fma<2, 16>());
}

} // namespace portable
