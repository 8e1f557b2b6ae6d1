// Layer normalisation: a row is held in registers by one warp or a few, so memory is read once and the variance is
// taken
// in a second pass over registers, where a large mean cannot cancel.
#include "layer_norm.h"

#include "../columns.cuh"
#include "../elements.cuh"

using namespace lcm;

namespace {

// How many threads share a row, a power of two from a warp to a block.
struct RowPlan {
  int threads_per_row, threads;
  unsigned blocks;
  RowPlan(int64_t rows, int packs, int packs_per_thread) {
    threads_per_row = 32;
    while (threads_per_row * packs_per_thread < packs) threads_per_row *= 2;
    threads = threads_per_row > 128 ? threads_per_row : 128;
    blocks = static_cast<unsigned>(divide_up<int64_t>(rows, threads / threads_per_row));
  }
};

// Packs a thread holds at most. Single elements are the rare path: enough for 8192 channels in a block of 1024.
template <int V>
constexpr int kHeld = V == 1 ? 8 : 4;

// The sum over the threads that share a row. `scratch`: a float a warp.
__device__ __forceinline__ float row_sum(float value, int threads_per_row, float *scratch) {
  value = warp_sum(value);
  if (threads_per_row == 32) return value;
  int warps = threads_per_row / 32, warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  const float *of_row = scratch + warp / warps * warps;
  value = 0.0f;
  for (int i = 0; i < warps; ++i) value += of_row[i];
  __syncthreads();
  return value;
}

// Grid: blocks of threads / threads_per_row rows each.
template <class T, int V>
__global__ void __launch_bounds__(V == 1 ? 1024 : 512)
    forward(const T *x, const T *residual, const T *weight, const T *bias, T *h, T *y, float *mean, float *rstd,
            int64_t rows, int channels, int threads_per_row, float eps) {
  __shared__ float scratch[32];
  constexpr int K = kHeld<V>;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row;
  int thread = threadIdx.x % threads_per_row, packs = row < rows ? channels / V : 0;
  row *= channels;
  Pack<T, V> held[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) held[k] = load_pack<V>(x + row + (thread + k * threads_per_row) * V);
  if (residual) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (thread + k * threads_per_row < packs) {
        int64_t at = row + (thread + k * threads_per_row) * V;
        Pack<T, V> other = load_pack<V>(residual + at);
#pragma unroll
        for (int i = 0; i < V; ++i)
          held[k].values[i] = T(static_cast<float>(held[k].values[i]) + static_cast<float>(other.values[i]));
        *reinterpret_cast<Pack<T, V> *>(h + at) = held[k];
      }
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += static_cast<float>(held[k].values[i]);
    }
  float centre = row_sum(sum, threads_per_row, scratch) / channels;
  sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float off = static_cast<float>(held[k].values[i]) - centre;
        sum += off * off;
      }
    }
  float scale = 1.0f / sqrtf(row_sum(sum, threads_per_row, scratch) / channels + eps);
  if (packs == 0) return;
  if (thread == 0) {
    mean[row / channels] = centre;
    rstd[row / channels] = scale;
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
      int c = (thread + k * threads_per_row) * V;
      float values[V], weights[V], biases[V];
      to_floats<V>(held[k], values);
      load<V>(weight + c, weights);
      load<V>(bias + c, biases);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = (values[i] - centre) * scale * weights[i] + biases[i];
      store<V>(y + row + c, values);
    }
}

// The same for rows of at most 32 K packs: a warp takes a row, starts all its loads before the first is used, and needs no
// other warp. Grid: blocks of kWarps rows.
constexpr int kWarps = 4;

// Makes the compiler forget what it computed of the pack: it would hold the values as f32 too, and spill.
template <class T, int V>
__device__ __forceinline__ void forget(Pack<T, V> &pack) {
  auto *words = reinterpret_cast<uint32_t *>(&pack);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 4); ++i) asm volatile("" : "+r"(words[i]));
}

template <class T, int V, int K>
__global__ void __launch_bounds__(32 * kWarps, 4)
    forward_of_warp(const T *x, const T *residual, const T *weight, const T *bias, T *h, T *y, float *mean, float *rstd,
                    int64_t rows, int channels, float eps) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int lane = threadIdx.x % 32, packs = channels / V;
  wait_for_previous();
  if (row >= rows) return;
  int64_t start = row * channels;
  Pack<T, V> held[K], others[K], weights[K], biases[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane + k * 32 < packs) held[k] = load_pack<V>(x + start + (lane + k * 32) * V);
  if (residual) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (lane + k * 32 < packs) others[k] = load_pack<V>(residual + start + (lane + k * 32) * V);
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane + k * 32 < packs) {
      weights[k] = load_pack<V>(weight + (lane + k * 32) * V);
      biases[k] = load_pack<V>(bias + (lane + k * 32) * V);
    }
  if (residual) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (lane + k * 32 < packs) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          held[k].values[i] = T(static_cast<float>(held[k].values[i]) + static_cast<float>(others[k].values[i]));
        *reinterpret_cast<Pack<T, V> *>(h + start + (lane + k * 32) * V) = held[k];
      }
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane + k * 32 < packs) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += static_cast<float>(held[k].values[i]);
    }
  float centre = warp_sum(sum) / channels;
  sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane + k * 32 < packs) {
      forget(held[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float off = static_cast<float>(held[k].values[i]) - centre;
        sum += off * off;
      }
    }
  float scale = 1.0f / sqrtf(warp_sum(sum) / channels + eps);
  if (lane == 0) {
    mean[row] = centre;
    rstd[row] = scale;
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (lane + k * 32 < packs) {
      forget(held[k]), forget(weights[k]), forget(biases[k]);
      float values[V], factors[V], offsets[V];
      to_floats<V>(held[k], values);
      to_floats<V>(weights[k], factors);
      to_floats<V>(biases[k], offsets);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = (values[i] - centre) * scale * factors[i] + offsets[i];
      store<V>(y + start + (lane + k * 32) * V, values);
    }
}

// dx = rstd (g - mean(g) - n mean(g n)) + dh, with g = dy weight and n the normalised row.
template <class T, int V>
__global__ void __launch_bounds__(V == 1 ? 1024 : 512)
    backward(const T *h, const T *weight, const float *mean, const float *rstd, const T *dy, const T *dh, T *dx,
             int64_t rows, int channels, int threads_per_row) {
  __shared__ float scratch[32];
  constexpr int K = kHeld<V>;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row;
  int thread = threadIdx.x % threads_per_row, packs = row < rows ? channels / V : 0;
  wait_for_previous();
  float centre = packs ? mean[row] : 0.0f, scale = packs ? rstd[row] : 0.0f;
  row *= channels;
  Pack<T, V> xs[K], gs[K], others[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
      int64_t at = row + (thread + k * threads_per_row) * V;
      xs[k] = load_pack<V>(h + at);
      gs[k] = load_pack<V>(dy + at);
      if (dh) others[k] = load_pack<V>(dh + at);
    }
  float plain = 0.0f, along = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
      float weights[V];
      load<V>(weight + (thread + k * threads_per_row) * V, weights);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float g = static_cast<float>(gs[k].values[i]) * weights[i];
        plain += g;
        along += g * ((static_cast<float>(xs[k].values[i]) - centre) * scale);
      }
    }
  plain = row_sum(plain, threads_per_row, scratch) / channels;
  along = row_sum(along, threads_per_row, scratch) / channels;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * threads_per_row < packs) {
      int c = (thread + k * threads_per_row) * V;
      float weights[V], values[V];
      load<V>(weight + c, weights);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float n = (static_cast<float>(xs[k].values[i]) - centre) * scale;
        values[i] = scale * (static_cast<float>(gs[k].values[i]) * weights[i] - plain - n * along);
      }
      if (dh) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] += static_cast<float>(others[k].values[i]);
      }
      store<V>(dx + row + c, values);
    }
}

// For the gradients of weight and bias: sums over rows of dy n and dy.
template <class T>
struct WeightSums {
  const T *h, *dy;
  const float *mean, *rstd;
  int channels;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row, int c, float (&sums)[2][V]) const {
    float x[V], g[V], centre = mean[row], scale = rstd[row];
    load<V>(h + row * channels + c, x);
    load<V>(dy + row * channels + c, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i] += g[i] * ((x[i] - centre) * scale);
      sums[1][i] += g[i];
    }
  }
};

bool takes(int64_t rows, int channels) { return rows >= 0 && rows < (1ll << 31) && channels >= 1 && channels <= 8192; }

} // namespace

extern "C" int lcm_layer_norm_forward(const void *x, const void *residual, const void *weight, const void *bias, void *h,
                                      void *y, float *mean, float *rstd, int64_t rows, int channels, float eps, int dtype,
                                      cudaStream_t stream) {
  if (!takes(rows, channels) || (residual && !h)) return -1;
  if (rows == 0) return 0;
  bool vectorised = channels % wide(dtype) == 0 && aligned(x, residual, weight, bias, h, y);
  return dispatch(dtype, vectorised, [&](auto kind) {
    using T = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    if constexpr (V > 1) {
      auto by_warps = [&](auto kernel) {
        return launch_dependent(kernel, static_cast<unsigned>(divide_up<int64_t>(rows, kWarps)), 32 * kWarps, 0, stream,
                                (const T *)x, (const T *)residual, (const T *)weight, (const T *)bias, (T *)h, (T *)y, mean,
                                rstd, rows, channels, eps);
      };
      if (channels <= 96 * V) return by_warps(forward_of_warp<T, V, 3>);
      if (channels <= 160 * V) return by_warps(forward_of_warp<T, V, 5>);
    }
    RowPlan plan(rows, channels / V, kHeld<V>);
    forward<T, V><<<plan.blocks, plan.threads, 0, stream>>>(
        (const T *)x, (const T *)residual, (const T *)weight, (const T *)bias, (T *)h, (T *)y, mean, rstd, rows, channels,
        plan.threads_per_row, eps);
    return launched();
  });
}

extern "C" size_t lcm_layer_norm_workspace(int64_t rows, int channels) {
  return channels < 1 ? 0 : column_workspace(1, rows, channels, 2);
}

extern "C" int lcm_layer_norm_backward(const void *h, const void *weight, const float *mean, const float *rstd,
                                       const void *dy, const void *dh, void *dx, float *dweight, float *dbias,
                                       int64_t rows, int channels, int dtype, void *workspace, cudaStream_t stream) {
  bool sums_wanted = dweight || dbias;
  if (!takes(rows, channels) || (sums_wanted && !workspace)) return -1;
  bool vectorised = channels % wide(dtype) == 0 && aligned(h, weight, dy, dh, dx);
  return dispatch(dtype, vectorised, [&](auto kind) {
    using T = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    if (dx && rows > 0) {
      RowPlan plan(rows, channels / V, kHeld<V>);
      int error = launch_dependent(backward<T, V>, plan.blocks, plan.threads, 0, stream, (const T *)h, (const T *)weight,
                                   mean, rstd, (const T *)dy, (const T *)dh, (T *)dx, rows, channels,
                                   plan.threads_per_row);
      if (error) return error;
    }
    if (!sums_wanted) return 0;
    WeightSums<T> sums{(const T *)h, (const T *)dy, mean, rstd, channels};
    return column_sums<V, 2>(sums, 1, rows, channels, dweight, dbias, workspace, stream);
  });
}
