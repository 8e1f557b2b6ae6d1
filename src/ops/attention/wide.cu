// Softmax of a block of scores and its gradient, one block of threads a row, everything in f32.
//
// Rows are long (all pixels of a picture). Going forward, those of up to 16384 scores (128 x 128 pixels) stay in registers
// and are read once; longer ones, and those of the gradient, are read from memory or cache two or three times.
#include "wide.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A value of every thread combined over the block, in a fixed order.
template <class Combine>
__device__ __forceinline__ float over_block(float value, Combine combine) {
  __shared__ float parts[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, parts[warp]);
  return value;
}

// Keys that a row sees.
__device__ __forceinline__ int64_t seen(int64_t row, int64_t keys, int64_t first_query, bool causal) {
  return causal ? min(keys, first_query + row + 1) : keys;
}

// Grid: (rows).
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax(const float *scores, T *weights, float *lse, int64_t keys, int64_t first_query, bool causal) {
  int64_t row = blockIdx.x, end = seen(row, keys, first_query, causal);
  scores += row * keys;
  weights += row * keys;
  float most = -INFINITY, sum = 0.0f;
  for (int64_t key = threadIdx.x; key < end; key += kThreads) most = fmaxf(most, scores[key]);
  most = over_block(most, [](float a, float b) { return fmaxf(a, b); });
  for (int64_t key = threadIdx.x; key < end; key += kThreads) sum += expf(scores[key] - most);
  sum = over_block(sum, [](float a, float b) { return a + b; });
  for (int64_t key = threadIdx.x; key < keys; key += kThreads)
    weights[key] = T(key < end ? expf(scores[key] - most) / sum : 0.0f);
  if (threadIdx.x == 0) lse[row] = most + logf(sum);
}

constexpr int kHeld = 16; // packs of 4 scores a thread keeps
constexpr int kMostHeld = kThreads * kHeld * 4;

// The same for rows of at most `kMostHeld` keys, a multiple of 4.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_held(const float *scores, T *weights, float *lse, int keys, int64_t first_query, bool causal) {
  int64_t row = blockIdx.x;
  int end = static_cast<int>(seen(row, keys, first_query, causal));
  scores += row * keys;
  weights += row * keys;
  float held[kHeld][4], most = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    int key = (i * kThreads + threadIdx.x) * 4;
    if (key < end) load<4>(scores + key, held[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (key + j >= end) held[i][j] = -INFINITY;
      most = fmaxf(most, held[i][j]);
    }
  }
  most = over_block(most, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      held[i][j] = expf(held[i][j] - most);
      sum += held[i][j];
    }
  sum = over_block(sum, [](float a, float b) { return a + b; });
  float scale = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    int key = (i * kThreads + threadIdx.x) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) held[i][j] *= scale;
    if (key < keys) store<4>(weights + key, held[i]);
  }
  if (threadIdx.x == 0) lse[row] = most + logf(sum);
}

// Grid: (rows).
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_gradient(const float *scores, const float *lse, const float *dweights, T *weights, T *slopes, int64_t keys,
                     int64_t first_query, bool causal, float scale) {
  int64_t row = blockIdx.x, end = seen(row, keys, first_query, causal);
  scores += row * keys;
  dweights += row * keys;
  weights += row * keys;
  slopes += row * keys;
  float log_sum = lse[row], dot = 0.0f;
  for (int64_t key = threadIdx.x; key < end; key += kThreads) dot += expf(scores[key] - log_sum) * dweights[key];
  dot = over_block(dot, [](float a, float b) { return a + b; });
  for (int64_t key = threadIdx.x; key < keys; key += kThreads) {
    float weight = key < end ? expf(scores[key] - log_sum) : 0.0f;
    weights[key] = T(weight);
    slopes[key] = T(key < end ? scale * weight * (dweights[key] - dot) : 0.0f);
  }
}

bool taken(int64_t rows, int64_t keys) { return rows >= 0 && keys >= 1 && rows < (1ll << 31); }

} // namespace

extern "C" int lcm_attention_softmax(const float *scores, void *weights, float *lse, int64_t rows, int64_t keys,
                                     int64_t first_query, int causal, int dtype, cudaStream_t stream) {
  if (!taken(rows, keys)) return -1;
  if (rows == 0) return 0;
  return dispatch(dtype, false, [&](auto kind) {
    using T = typename decltype(kind)::type;
    if (keys <= kMostHeld && keys % 4 == 0 && aligned(scores, weights))
      softmax_held<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(scores, (T *)weights, lse, static_cast<int>(keys), first_query, causal != 0);
    else softmax<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(scores, (T *)weights, lse, keys, first_query, causal != 0);
    return launched();
  });
}

extern "C" int lcm_attention_softmax_gradient(const float *scores, const float *lse, const float *dweights, void *weights,
                                              void *slopes, int64_t rows, int64_t keys, int64_t first_query, int causal,
                                              float scale, int dtype, cudaStream_t stream) {
  if (!taken(rows, keys)) return -1;
  if (rows == 0) return 0;
  return dispatch(dtype, false, [&](auto kind) {
    using T = typename decltype(kind)::type;
    softmax_gradient<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        scores, lse, dweights, (T *)weights, (T *)slopes, keys, first_query, causal != 0, scale);
    return launched();
  });
}
