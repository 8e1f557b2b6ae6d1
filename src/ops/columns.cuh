// Deterministic sums over the rows of a matrix, in two stages: partial sums of chunks of rows, then their sum in order.
//
// No atomics, and the chunks depend only on the shape and the device: equal bit for bit between runs.
#pragma once
#include "elements.cuh"

namespace lcm {

constexpr int kColumnThreads = 256;

// How the sums over `rows` of `channels` columns are split, for each of `batch` matrices.
struct ColumnPlan {
  int lanes;           // threads side by side, a pack of columns each
  int slabs;           // blocks side by side
  int chunks;          // blocks of rows
  int64_t per_chunk;   // rows in each but the last

  // Always for single elements where `vector` is 1, so that a workspace sized with 1 suffices for every width.
  ColumnPlan(int64_t batch, int64_t rows, int channels, int vector) {
    int packs = channels / vector;
    slabs = divide_up(packs, 32);
    lanes = divide_up(packs, slabs); // as even as can be: 40 packs are 2 times 20
    int64_t side_by_side = kColumnThreads / lanes;
    int64_t most = divide_up<int64_t>(rows, side_by_side * 4); // four rows a thread at least: less is not worth a block
    int64_t wanted = divide_up<int64_t>(4ll * multiprocessors(), static_cast<int64_t>(slabs) * batch);
    chunks = static_cast<int>(wanted < most ? wanted : most);
    if (chunks < 1) chunks = 1;
    per_chunk = divide_up<int64_t>(rows, chunks);
    if (per_chunk < 1) per_chunk = 1;
    chunks = rows < 1 ? 1 : static_cast<int>(divide_up<int64_t>(rows, per_chunk));
  }
};

// Bytes that the partial sums of `quantities` need whatever the width of the accesses.
inline size_t column_workspace(int64_t batch, int64_t rows, int channels, int quantities) {
  size_t most = 0;
  for (int vector : {1, 4, 8}) {
    if (channels % vector != 0) continue;
    size_t bytes = sizeof(float) * batch * ColumnPlan(batch, rows, channels, vector).chunks * quantities * channels;
    if (bytes > most) most = bytes;
  }
  return most;
}

// partial[batch][chunk][quantity][channel] = sum over the rows of the chunk of what `f(row, channel, sums)` adds to
// sums.
// Rows count through all matrices of the batch. Grid: (slabs, chunks, batch).
template <int V, int Q, class F>
__global__ void __launch_bounds__(kColumnThreads)
    column_partials(F f, int64_t rows, int64_t per_chunk, int lanes, int channels, float *partial) {
  __shared__ float sums_of_threads[V * kColumnThreads];
  int lane = threadIdx.x % lanes, side = threadIdx.x / lanes, sides = kColumnThreads / lanes;
  int slab = blockIdx.x * lanes * V, c = slab + lane * V;
  float sums[Q][V] = {};
  int64_t first = blockIdx.z * rows, end = (blockIdx.y + 1) * per_chunk;
  if (end > rows) end = rows;
  if (side < sides && c < channels) {
#pragma unroll 4
    for (int64_t row = blockIdx.y * per_chunk + side; row < end; row += sides) f(first + row, c, sums);
  }
  let_next_start();
  partial += (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * Q * channels;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums_of_threads[i * kColumnThreads + threadIdx.x] = sums[q][i];
    __syncthreads();
    for (int j = threadIdx.x; j < lanes * V; j += kColumnThreads) {
      int channel = slab + j;
      if (channel < channels) {
        const float *from = sums_of_threads + (j % V) * kColumnThreads + j / V;
        float total = 0.0f;
        for (int s = 0; s < sides; ++s) total += from[s * lanes];
        partial[static_cast<int64_t>(q) * channels + channel] = total;
      }
    }
    __syncthreads();
  }
}

constexpr int kFinishColumns = 32, kFinishRows = 8;

// Adds the partial sums of `parts` parts in order: first[batch][c] of the columns below `channels`, second[batch][c] of
// those after (either may be null). partial: (batch, parts, width). Grid: (width / 32, batch), block: (32, 8).
static __global__ void finish_columns(const float *partial, int parts, int width, int channels, float *first,
                                      float *second) {
  __shared__ float sums[kFinishRows][kFinishColumns];
  int column = blockIdx.x * kFinishColumns + threadIdx.x;
  partial += static_cast<int64_t>(blockIdx.y) * parts * width;
  float sum = 0.0f;
  wait_for_previous();
  if (column < width)
    for (int part = threadIdx.y; part < parts; part += kFinishRows) sum += partial[static_cast<int64_t>(part) * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int row = 1; row < kFinishRows; ++row) sum += sums[row][threadIdx.x];
  float *to = column < channels ? first : second;
  if (to) to[static_cast<int64_t>(blockIdx.y) * channels + column % channels] = sum;
}

inline int launch_finish_columns(const float *partial, int64_t batch, int parts, int width, int channels, float *first,
                                 float *second, cudaStream_t stream) {
  dim3 grid(divide_up(width, kFinishColumns), static_cast<unsigned>(batch));
  return launch_dependent(finish_columns, grid, dim3(kFinishColumns, kFinishRows), 0, stream, partial, parts, width,
                          channels, first, second);
}

// Both stages: first and second get the sums of the quantities 0 and 1 (Q = 1: only first), each (batch, channels).
template <int V, int Q, class F>
int column_sums(F f, int64_t batch, int64_t rows, int channels, float *first, float *second, void *workspace,
                cudaStream_t stream) {
  ColumnPlan plan(batch, rows, channels, V);
  if (batch > 65535) return -1;
  dim3 grid(plan.slabs, plan.chunks, static_cast<unsigned>(batch));
  auto *partial = static_cast<float *>(workspace);
  column_partials<V, Q><<<grid, kColumnThreads, 0, stream>>>(f, rows, plan.per_chunk, plan.lanes, channels, partial);
  if (int error = launched()) return error;
  return launch_finish_columns(partial, batch, plan.chunks, Q * channels, channels, first, second, stream);
}

} // namespace lcm
