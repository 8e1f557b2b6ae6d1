// Bilinear resizing. A first, tiny kernel computes the filters of both axes in f64, as the CPU does; the second gathers,
// both axes at once: pictures are few and small beside a network's activations. The gradient gathers too (which output
// pixels an input pixel contributes to is an interval), so it needs no atomics and no order is left to chance.
#include "resize_bilinear.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

// The filter of one axis: output pixel o mixes `count[o]` input pixels from `first[o]` on, by weights[o * most ...].
struct Taps {
  int from, to, most;
  int *first, *count;
  float *weights;
};

int most_taps(int from, int to, bool antialias) {
  // A triangle covers twice its half-width, and rounding must not make it one pixel more than there is room for.
  return (antialias && from > to ? 2 * divide_up(from, to) : 2) + 1;
}

size_t taps_bytes(int from, int to, bool antialias) {
  return static_cast<size_t>(to) * (2 * sizeof(int) + sizeof(float) * most_taps(from, to, antialias));
}

Taps taps_at(void *memory, int from, int to, bool antialias) {
  int most = most_taps(from, to, antialias), *first = static_cast<int *>(memory);
  return Taps{from, to, most, first, first + to, reinterpret_cast<float *>(first + 2 * to)};
}

// One thread an output pixel; blockIdx.y: the axis.
__global__ void fill_taps(Taps vertical, Taps horizontal, bool antialias) {
  const Taps &taps = blockIdx.y == 0 ? vertical : horizontal;
  int o = blockIdx.x * blockDim.x + threadIdx.x;
  if (o >= taps.to) return;
  float *weights = taps.weights + static_cast<int64_t>(o) * taps.most;
  double scale = static_cast<double>(taps.from) / taps.to, centre = scale * (o + 0.5);
  if (antialias) {
    double reach = fmax(scale, 1.0), total = 0.0;
    int first = static_cast<int>(fmax(centre - reach + 0.5, 0.0)), end = min(static_cast<int>(centre + reach + 0.5), taps.from);
    int count = min(end - first, taps.most);
    auto weight = [&](int i) { return fmax(1.0 - fabs((i - centre + 0.5) / reach), 0.0); };
    for (int k = 0; k < count; ++k) total += weight(first + k);
    for (int k = 0; k < count; ++k) weights[k] = static_cast<float>(weight(first + k) / total);
    taps.first[o] = first;
    taps.count[o] = count;
    return;
  }
  double position = fmax(centre - 0.5, 0.0);
  int first = min(static_cast<int>(position), taps.from - 1);
  bool last = first + 1 >= taps.from;
  double share = last ? 0.0 : position - first;
  taps.first[o] = first;
  taps.count[o] = last ? 1 : 2;
  weights[0] = static_cast<float>(1.0 - share);
  weights[1] = static_cast<float>(share);
}

// Decomposes the index of a pack of (batch, height, width, channels).
template <int V>
__device__ __forceinline__ void position_of(int64_t i, unsigned height, unsigned width, unsigned channels,
                                            int64_t &sample, unsigned &y, unsigned &x, unsigned &c) {
  int64_t pixel;
  split_index<V>(i, channels, pixel, c);
  unsigned line = static_cast<unsigned>(pixel) / width;
  x = static_cast<unsigned>(pixel) - line * width;
  sample = line / height;
  y = line - static_cast<unsigned>(sample) * height;
}

template <class T>
struct Forward {
  const T *x;
  T *y;
  Taps vertical, horizontal;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t sample;
    unsigned row, column, c;
    position_of<V>(i, vertical.to, horizontal.to, channels, sample, row, column, c);
    int top = vertical.first[row], left = horizontal.first[column];
    const float *down = vertical.weights + static_cast<int64_t>(row) * vertical.most;
    const float *across = horizontal.weights + static_cast<int64_t>(column) * horizontal.most;
    int lines = vertical.count[row], pixels = horizontal.count[column];
    float sum[V] = {};
    for (int a = 0; a < lines; ++a) {
      const T *line = x + ((sample * vertical.from + top + a) * horizontal.from + left) * channels + c;
      float mixed[V] = {};
      for (int b = 0; b < pixels; ++b) {
        float values[V];
        load<V>(line + static_cast<int64_t>(b) * channels, values);
#pragma unroll
        for (int k = 0; k < V; ++k) mixed[k] += values[k] * across[b];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += mixed[k] * down[a];
    }
    store<V>(y + i, sum);
  }
};

// The output pixels, [begin, end), whose filters may contain input pixel i: filters move on with their centres, at
// scale (o + 0.5), and reach less than reach + 1 to either side. A pixel more than that is looked at at either end, and
// the borders at both, where filters are cut.
__device__ __forceinline__ void outputs_near(const Taps &taps, int i, int &begin, int &end) {
  double scale = static_cast<double>(taps.from) / taps.to, reach = fmax(scale, 1.0) + 1.0;
  begin = i == 0 ? 0 : max(static_cast<int>((i + 0.5 - reach) / scale - 0.5) - 1, 0);
  end = i == taps.from - 1 ? taps.to : min(static_cast<int>((i + 0.5 + reach) / scale - 0.5) + 3, taps.to);
}

// The weight of input pixel i in output pixel o.
__device__ __forceinline__ float weight_of(const Taps &taps, int o, int i) {
  int k = i - taps.first[o];
  return k >= 0 && k < taps.count[o] ? taps.weights[static_cast<int64_t>(o) * taps.most + k] : 0.0f;
}

template <class T>
struct Backward {
  const T *dy;
  T *dx;
  Taps vertical, horizontal;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t sample;
    unsigned row, column, c;
    position_of<V>(i, vertical.from, horizontal.from, channels, sample, row, column, c);
    int top, bottom, left, right;
    outputs_near(vertical, row, top, bottom);
    outputs_near(horizontal, column, left, right);
    float sum[V] = {};
    for (int a = top; a < bottom; ++a) {
      float down = weight_of(vertical, a, row);
      if (down == 0.0f) continue;
      const T *line = dy + (sample * vertical.to + a) * horizontal.to * channels + c;
      float mixed[V] = {};
      for (int b = left; b < right; ++b) {
        float across = weight_of(horizontal, b, column);
        if (across == 0.0f) continue;
        float values[V];
        load<V>(line + static_cast<int64_t>(b) * channels, values);
#pragma unroll
        for (int k = 0; k < V; ++k) mixed[k] += values[k] * across;
      }
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += mixed[k] * down;
    }
    store<V>(dx + i, sum);
  }
};

// Fills the filters and applies the pass F to the `count` elements of its output.
template <template <class> class F>
int launch(const void *from, void *to, int64_t count, int height, int width, int channels, int new_height,
           int new_width, int antialias, int dtype, void *workspace, cudaStream_t stream) {
  if (count < 0 || height < 1 || width < 1 || channels < 1 || new_height < 1 || new_width < 1) return -1;
  Taps vertical = taps_at(workspace, height, new_height, antialias);
  void *rest = static_cast<char *>(workspace) + taps_bytes(height, new_height, antialias);
  Taps horizontal = taps_at(rest, width, new_width, antialias);
  int longest = new_height > new_width ? new_height : new_width;
  fill_taps<<<dim3(divide_up(longest, 64), 2), 64, 0, stream>>>(vertical, horizontal, antialias != 0);
  if (int error = launched()) return error;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(from, to), [&](auto kind) {
    using T = typename decltype(kind)::type;
    F<T> f{(const T *)from, (T *)to, vertical, horizontal, (unsigned)channels};
    return map<decltype(kind)::width>(f, count, stream);
  });
}

} // namespace

extern "C" size_t lcm_resize_bilinear_workspace(int height, int width, int new_height, int new_width, int antialias) {
  if (height < 1 || width < 1 || new_height < 1 || new_width < 1) return 0;
  return taps_bytes(height, new_height, antialias) + taps_bytes(width, new_width, antialias);
}

extern "C" int lcm_resize_bilinear_forward(const void *x, void *y, int64_t batch, int height, int width, int channels,
                                           int new_height, int new_width, int antialias, int dtype, void *workspace,
                                           cudaStream_t stream) {
  return launch<Forward>(x, y, batch * new_height * new_width * channels, height, width, channels, new_height, new_width,
                         antialias, dtype, workspace, stream);
}

extern "C" int lcm_resize_bilinear_backward(const void *dy, void *dx, int64_t batch, int height, int width,
                                            int channels, int new_height, int new_width, int antialias, int dtype,
                                            void *workspace, cudaStream_t stream) {
  return launch<Backward>(dy, dx, batch * height * width * channels, height, width, channels, new_height, new_width,
                          antialias, dtype, workspace, stream);
}
