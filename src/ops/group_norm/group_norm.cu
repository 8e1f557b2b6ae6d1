// Group normalisation, forward: partial moments of chunks of pixels, then their combination and the normalised output.
//
// Two passes over x, of which the second finds it in L2 for the sizes of a U-Net at batch 1. Moments are taken of the
// differences from the sample's first pixel and combined by mean and sum of squared deviations: large means do not cancel.
#include "group_norm.h"

#include "tiles.cuh"

using namespace lcm;

namespace {

// partial[sample][group][chunk] = (mean, sum of squared deviations) of the group in the chunk. Grid: (chunks, batch).
template <class T, int V>
__global__ void __launch_bounds__(kNormThreads)
    partial_moments(Joined<const T> x, NormPlan plan, int64_t pixels, int groups, float2 *partial) {
  extern __shared__ float shared[];
  int channels = x.channels1 + x.channels2;
  float *means = shared, *squares = means + channels, *scratch = squares + channels;
  int row = threadIdx.x / plan.columns, column = threadIdx.x % plan.columns;
  int64_t first_pixel = blockIdx.x * plan.per_chunk, sample = blockIdx.y * pixels;
  int count = static_cast<int>(min(plan.per_chunk, pixels - first_pixel));
  wait_for_previous();
  for (int base = 0; base < channels; base += plan.columns * V) {
    int c = base + column * V;
    float first[V] = {}, second[V] = {};
    if (c < channels && row < plan.rows) {
      int stride;
      const T *start = x.column(sample, c, stride);
      const T *from = start + first_pixel * stride;
      float shift[V];
      load<V>(start, shift);
      for (int pixel = row; pixel < count; pixel += plan.rows * kNormUnroll) {
        Pack<T, V> packs[kNormUnroll];
#pragma unroll
        for (int u = 0; u < kNormUnroll; ++u)
          if (pixel + u * plan.rows < count)
            packs[u] = load_pack<V>(from + static_cast<int64_t>(pixel + u * plan.rows) * stride);
#pragma unroll
        for (int u = 0; u < kNormUnroll; ++u)
          if (pixel + u * plan.rows < count) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
              float difference = static_cast<float>(packs[u].values[i]) - shift[i];
              first[i] += difference;
              second[i] += difference * difference;
            }
          }
      }
      if (row == 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) squares[c + i] = shift[i]; // until the sums are there
      }
    }
    sum_rows(first, scratch, plan.rows, plan.columns, base, channels, [&](int channel, float sum) { means[channel] = sum; });
    sum_rows(second, scratch, plan.rows, plan.columns, base, channels, [&](int channel, float sum) {
      float off = means[channel] / count, origin = squares[channel];
      squares[channel] = fmaxf(sum - means[channel] * off, 0.0f);
      means[channel] = origin + off;
    });
  }
  let_next_start();
  int per_group = channels / groups, lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const float *mean_of = means + group * per_group, *squares_of = squares + group * per_group;
    float origin = mean_of[0], sum = 0.0f;
    for (int i = lane; i < per_group; i += 32) sum += mean_of[i] - origin;
    float mean = origin + warp_sum(sum) / per_group;
    sum = 0.0f;
    for (int i = lane; i < per_group; i += 32) {
      float off = mean_of[i] - mean;
      sum += squares_of[i] + count * off * off;
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[(static_cast<int64_t>(blockIdx.y) * groups + group) * gridDim.x + blockIdx.x] = make_float2(mean, sum);
  }
}

// Mean and rstd of a group from the moments of its chunks, by a warp.
__device__ __forceinline__ float2 combine(const float2 *partial, const NormPlan &plan, int64_t pixels, int per_group, float eps) {
  int lane = threadIdx.x % 32;
  auto share = [&](int chunk) { return static_cast<float>(min(plan.per_chunk, pixels - chunk * plan.per_chunk)); };
  float origin = partial[0].x, sum = 0.0f;
  for (int chunk = lane; chunk < plan.chunks; chunk += 32) sum += share(chunk) * (partial[chunk].x - origin);
  float mean = origin + warp_sum(sum) / static_cast<float>(pixels);
  sum = 0.0f;
  for (int chunk = lane; chunk < plan.chunks; chunk += 32) {
    float off = partial[chunk].x - mean;
    sum += partial[chunk].y + per_group * share(chunk) * off * off;
  }
  float variance = warp_sum(sum) / (static_cast<float>(pixels) * per_group);
  return make_float2(mean, 1.0f / sqrtf(variance + eps));
}

// Every block combines the moments of its sample (cheaper than a launch between), then treats its chunk of pixels, the
// last ones first: those are what L2 still holds of a large x.
template <class T, int V>
__global__ void __launch_bounds__(kNormThreads)
    normalise(Joined<const T> x, const T *weight, const T *bias, T *y, float *mean, float *rstd, NormPlan plan,
              int64_t pixels, int groups, float eps, int activation, const float2 *partial) {
  extern __shared__ float shared[];
  float *means = shared, *rstds = means + groups;
  int channels = x.channels1 + x.channels2, per_group = channels / groups;
  wait_for_previous();
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    int64_t index = static_cast<int64_t>(blockIdx.y) * groups + group;
    float2 moments = combine(partial + index * plan.chunks, plan, pixels, per_group, eps);
    if (threadIdx.x % 32 == 0) {
      means[group] = moments.x;
      rstds[group] = moments.y;
      if (blockIdx.x == 0) {
        mean[index] = moments.x;
        rstd[index] = moments.y;
      }
    }
  }
  __syncthreads();
  int row = threadIdx.x / plan.columns, column = threadIdx.x % plan.columns;
  if (row >= plan.rows) return;
  int64_t first_pixel = blockIdx.x * plan.per_chunk, sample = blockIdx.y * pixels;
  int count = static_cast<int>(min(plan.per_chunk, pixels - first_pixel));
  for (int c = column * V; c < channels; c += plan.columns * V) {
    float centre[V], scale[V], offset[V];
    load<V>(weight + c, scale);
    load<V>(bias + c, offset);
    int group[V];
    groups_of(c, per_group, group);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      centre[i] = means[group[i]];
      scale[i] *= rstds[group[i]];
    }
    int stride;
    const T *from = x.column(sample + first_pixel + count - 1, c, stride);
    T *to = y + (sample + first_pixel + count - 1) * channels + c;
    for (int pixel = row; pixel < count; pixel += plan.rows * kNormUnroll) {
      Pack<T, V> packs[kNormUnroll];
#pragma unroll
      for (int u = 0; u < kNormUnroll; ++u)
        if (pixel + u * plan.rows < count)
          packs[u] = load_pack<V>(from - static_cast<int64_t>(pixel + u * plan.rows) * stride);
#pragma unroll
      for (int u = 0; u < kNormUnroll; ++u)
        if (pixel + u * plan.rows < count) {
          float values[V];
          to_floats<V>(packs[u], values);
#pragma unroll
          for (int i = 0; i < V; ++i) values[i] = (values[i] - centre[i]) * scale[i] + offset[i];
          activate<T>(activation, values);
          store<V>(to - static_cast<int64_t>(pixel + u * plan.rows) * channels, values);
        }
    }
  }
}

} // namespace

extern "C" int lcm_group_norm_forward(const void *x1, const void *x2, const void *weight, const void *bias, void *y,
                                      float *mean, float *rstd, int64_t batch, int64_t pixels, int channels1,
                                      int channels2, int groups, float eps, int activation, int dtype, void *workspace,
                                      cudaStream_t stream) {
  int channels = channels1 + channels2;
  if (!takes(batch, pixels, channels1, channels2, groups, activation)) return -1;
  bool vectorised = channels1 % wide(dtype) == 0 && channels2 % wide(dtype) == 0 && aligned(x1, x2, weight, bias, y);
  return dispatch(dtype, vectorised, [&](auto kind) {
    using T = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    NormPlan plan(batch, pixels, channels, V);
    Joined<const T> x{(const T *)x1, (const T *)x2, channels1, channels2};
    dim3 grid(plan.chunks, static_cast<unsigned>(batch));
    auto *partial = static_cast<float2 *>(workspace);
    size_t shared = sizeof(float) * (2 * channels + V * plan.threads);
    if (int error = launch_dependent(partial_moments<T, V>, grid, plan.threads, shared, stream, x, plan, pixels, groups, partial)) return error;
    return launch_dependent(normalise<T, V>, grid, plan.threads, 2 * sizeof(float) * groups, stream, x,
                            (const T *)weight, (const T *)bias, (T *)y, mean, rstd, plan, pixels, groups, eps,
                            activation, partial);
  });
}
