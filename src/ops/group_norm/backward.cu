// Group normalisation, backward: sums per channel of the gradient g before the activation, plain and times the
// normalised input n; then dx = rstd (g weight - mean(g weight) - n mean(g weight n)), means over each group.
//
// g is recomputed from x in both passes rather than stored: the kernels are bound by memory, not by arithmetic.
#include "../columns.cuh"
#include "group_norm.h"
#include "tiles.cuh"

using namespace lcm;

namespace {

// What a thread knows of its pack of channels.
template <class T, int V>
struct Channels {
  float mean[V], rstd[V];
  Pack<T, V> weight, bias; // not as floats: registers are short

  __device__ __forceinline__ Channels(const T *weights, const T *biases, const float *means, const float *rstds, int c,
                                      int per_group)
      : weight(load_pack<V>(weights + c)), bias(load_pack<V>(biases + c)) {
    int group[V];
    groups_of(c, per_group, group);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mean[i] = means[group[i]];
      rstd[i] = rstds[group[i]];
    }
  }

  // Turns x into n and dy into g.
  __device__ __forceinline__ void recompute(int activation, float (&x)[V], float (&g)[V]) const {
    float z[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = (x[i] - mean[i]) * rstd[i];
      z[i] = x[i] * static_cast<float>(weight.values[i]) + static_cast<float>(bias.values[i]);
    }
    times_derivative<T>(activation, z, g);
  }
};

constexpr int kUnroll = 2; // two streams are read: half the packs of each in flight

// by_group[sample][group][chunk] = sums of (g weight, g n weight); by_channel[sample][chunk][2][channel] = sums of
// (g n, g), unless null. Grid: (chunks, batch).
template <class T, int V>
__global__ void __launch_bounds__(kNormThreads)
    partial_sums(Joined<const T> x, const T *dy, const T *weight, const T *bias, const float *mean, const float *rstd,
                 NormPlan plan, int64_t pixels, int groups, int activation, float2 *by_group, float *by_channel) {
  extern __shared__ float shared[];
  int channels = x.channels1 + x.channels2, per_group = channels / groups;
  float *plain = shared, *along = plain + channels, *scratch = along + channels;
  int row = threadIdx.x / plan.columns, column = threadIdx.x % plan.columns;
  int64_t first_pixel = blockIdx.x * plan.per_chunk, sample = blockIdx.y * pixels;
  int count = static_cast<int>(min(plan.per_chunk, pixels - first_pixel));
  mean += static_cast<int64_t>(blockIdx.y) * groups;
  rstd += static_cast<int64_t>(blockIdx.y) * groups;
  for (int base = 0; base < channels; base += plan.columns * V) {
    int c = base + column * V;
    float first[V] = {}, second[V] = {};
    if (c < channels && row < plan.rows) {
      Channels<T, V> known(weight, bias, mean, rstd, c, per_group);
      int stride;
      const T *from = x.column(sample + first_pixel, c, stride);
      const T *gradient = dy + (sample + first_pixel) * channels + c;
      for (int pixel = row; pixel < count; pixel += plan.rows * kUnroll) {
        Pack<T, V> xs[kUnroll], gs[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (pixel + u * plan.rows < count) {
            xs[u] = load_pack<V>(from + static_cast<int64_t>(pixel + u * plan.rows) * stride);
            gs[u] = load_pack<V>(gradient + static_cast<int64_t>(pixel + u * plan.rows) * channels);
          }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (pixel + u * plan.rows < count) {
            float n[V], g[V];
            to_floats<V>(xs[u], n);
            to_floats<V>(gs[u], g);
            known.recompute(activation, n, g);
#pragma unroll
            for (int i = 0; i < V; ++i) {
              first[i] += g[i];
              second[i] += g[i] * n[i];
            }
          }
      }
    }
    sum_rows(first, scratch, plan.rows, plan.columns, base, channels, [&](int channel, float sum) { plain[channel] = sum; });
    sum_rows(second, scratch, plan.rows, plan.columns, base, channels, [&](int channel, float sum) { along[channel] = sum; });
  }
  let_next_start();
  if (by_channel) {
    by_channel += (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * channels;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      by_channel[c] = along[c];
      by_channel[channels + c] = plain[c];
    }
  }
  int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    float first = 0.0f, second = 0.0f;
    for (int c = group * per_group + lane; c < (group + 1) * per_group; c += 32) {
      float w = static_cast<float>(weight[c]);
      first += w * plain[c];
      second += w * along[c];
    }
    first = warp_sum(first);
    second = warp_sum(second);
    if (lane == 0) by_group[(static_cast<int64_t>(blockIdx.y) * groups + group) * gridDim.x + blockIdx.x] = make_float2(first, second);
  }
}

// Adds: so_far, of the shape of an x that is not joined, is added to the gradient.
template <class T, int V, bool Adds>
__global__ void __launch_bounds__(kNormThreads)
    input_gradient(Joined<const T> x, const T *dy, const T *weight, const T *bias, const float *mean, const float *rstd,
                   Joined<T> dx, const T *so_far, NormPlan plan, int64_t pixels, int groups, int activation, const float2 *by_group) {
  extern __shared__ float shared[];
  float *plain = shared, *along = plain + groups;
  int channels = x.channels1 + x.channels2, per_group = channels / groups;
  float size = static_cast<float>(pixels) * per_group;
  wait_for_previous();
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const float2 *parts = by_group + (static_cast<int64_t>(blockIdx.y) * groups + group) * plan.chunks;
    float first = 0.0f, second = 0.0f;
    for (int chunk = threadIdx.x % 32; chunk < plan.chunks; chunk += 32) {
      first += parts[chunk].x;
      second += parts[chunk].y;
    }
    first = warp_sum(first);
    second = warp_sum(second);
    if (threadIdx.x % 32 == 0) {
      plain[group] = first / size;
      along[group] = second / size;
    }
  }
  __syncthreads();
  int row = threadIdx.x / plan.columns, column = threadIdx.x % plan.columns;
  if (row >= plan.rows) return;
  int64_t first_pixel = blockIdx.x * plan.per_chunk, sample = blockIdx.y * pixels;
  int count = static_cast<int>(min(plan.per_chunk, pixels - first_pixel));
  int64_t last = sample + first_pixel + count - 1; // backwards: L2 holds what the sums read last
  mean += static_cast<int64_t>(blockIdx.y) * groups;
  rstd += static_cast<int64_t>(blockIdx.y) * groups;
  for (int c = column * V; c < channels; c += plan.columns * V) {
    Channels<T, V> known(weight, bias, mean, rstd, c, per_group);
    float plain_of[V], along_of[V];
    int group[V];
    groups_of(c, per_group, group);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      plain_of[i] = plain[group[i]];
      along_of[i] = along[group[i]];
    }
    int stride, to_stride;
    const T *from = x.column(last, c, stride);
    const T *gradient = dy + last * channels + c;
    T *to = dx.column(last, c, to_stride);
    const T *before = Adds ? so_far + last * channels + c : nullptr;
    for (int pixel = row; pixel < count; pixel += plan.rows * kUnroll) {
      Pack<T, V> xs[kUnroll], gs[kUnroll], sums[Adds ? kUnroll : 1];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (pixel + u * plan.rows < count) {
          xs[u] = load_pack<V>(from - static_cast<int64_t>(pixel + u * plan.rows) * stride);
          gs[u] = load_pack<V>(gradient - static_cast<int64_t>(pixel + u * plan.rows) * channels);
          if constexpr (Adds) sums[u] = load_pack<V>(before - static_cast<int64_t>(pixel + u * plan.rows) * channels);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (pixel + u * plan.rows < count) {
          float n[V], g[V];
          to_floats<V>(xs[u], n);
          to_floats<V>(gs[u], g);
          known.recompute(activation, n, g);
#pragma unroll
          for (int i = 0; i < V; ++i)
            g[i] = known.rstd[i] * (g[i] * static_cast<float>(known.weight.values[i]) - plain_of[i] - n[i] * along_of[i]);
          if constexpr (Adds) {
            float sum[V];
            to_floats<V>(sums[u], sum);
#pragma unroll
            for (int i = 0; i < V; ++i) g[i] += sum[i];
          }
          store<V>(to - static_cast<int64_t>(pixel + u * plan.rows) * to_stride, g);
        }
    }
  }
}

// Bytes of the sums by group, up to the 16-byte boundary where those by channel start.
size_t group_bytes(int64_t batch, const NormPlan &plan, int groups) {
  return divide_up<size_t>(sizeof(float2) * batch * groups * plan.chunks, 16) * 16;
}

} // namespace

extern "C" size_t lcm_group_norm_workspace(int64_t batch, int64_t pixels, int channels, int groups) {
  size_t most = 0;
  if (batch < 1 || pixels < 1 || channels < 1 || groups < 1) return most;
  for (int vector : {1, 4, 8}) {
    if (channels % vector != 0) continue;
    NormPlan plan(batch, pixels, channels, vector);
    size_t bytes = group_bytes(batch, plan, groups) + sizeof(float) * batch * plan.chunks * 2 * channels;
    if (bytes > most) most = bytes;
  }
  return most;
}

extern "C" int lcm_group_norm_backward(const void *x1, const void *x2, const void *weight, const void *bias,
                                       const float *mean, const float *rstd, const void *dy, const void *so_far,
                                       void *dx1, void *dx2, float *dweight, float *dbias, int64_t batch, int64_t pixels, int channels1,
                                       int channels2, int groups, int activation, int dtype, void *workspace,
                                       cudaStream_t stream) {
  int channels = channels1 + channels2;
  if (!takes(batch, pixels, channels1, channels2, groups, activation) || (dx1 && channels2 > 0 && !dx2) || (so_far && x2))
    return -1;
  bool sums_wanted = dweight || dbias;
  if (!dx1 && !sums_wanted) return 0; // the first kernel lets the next one start, so there has to be one
  bool vectorised = channels1 % wide(dtype) == 0 && channels2 % wide(dtype) == 0 &&
                    aligned(x1, x2, weight, bias, dy, so_far, dx1, dx2);
  return dispatch(dtype, vectorised, [&](auto kind) {
    using T = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    NormPlan plan(batch, pixels, channels, V);
    Joined<const T> x{(const T *)x1, (const T *)x2, channels1, channels2};
    const T *g = (const T *)dy, *w = (const T *)weight, *b = (const T *)bias;
    dim3 grid(plan.chunks, static_cast<unsigned>(batch));
    auto *by_group = static_cast<float2 *>(workspace);
    auto *by_channel = reinterpret_cast<float *>(static_cast<char *>(workspace) + group_bytes(batch, plan, groups));
    size_t shared = sizeof(float) * (2 * channels + V * plan.threads);
    partial_sums<T, V><<<grid, plan.threads, shared, stream>>>(x, g, w, b, mean, rstd, plan, pixels, groups, activation,
                                                               by_group, sums_wanted ? by_channel : nullptr);
    if (int error = launched()) return error;
    if (dx1) {
      Joined<T> dx{(T *)dx1, (T *)dx2, channels1, channels2};
      auto kernel = so_far ? input_gradient<T, V, true> : input_gradient<T, V, false>;
      int error = launch_dependent(kernel, grid, plan.threads, 2 * sizeof(float) * groups, stream, x, g, w, b, mean, rstd,
                                   dx, (const T *)so_far, plan, pixels, groups, activation, by_group);
      if (error) return error;
    }
    if (!sums_wanted) return 0;
    int parts = static_cast<int>(batch) * plan.chunks;
    return launch_finish_columns(by_channel, 1, parts, 2 * channels, channels, dweight, dbias, stream);
  });
}
