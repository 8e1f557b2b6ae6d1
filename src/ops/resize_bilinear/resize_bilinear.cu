// Bilinear and bicubic resizing. A first, tiny kernel computes the filters of both axes in f64, as the CPU does; the second
// gathers, both axes at once: pictures are few and small beside a network's activations. The gradient gathers too (which output
// pixels an input pixel contributes to is an interval), so it needs no atomics and no order is left to chance.
#include "resize_bilinear.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

// A kind of filter, as the launchers' `filter` counts them.
enum Filter { kLinear, kTriangle, kKeys };

// Pixels a filter reaches to both sides of its centre, where it is not stretched.
__host__ __device__ inline int support(Filter filter) { return filter == kKeys ? 2 : 1; }

// The filter of one axis: output pixel o mixes `count[o]` input pixels from `first[o]` on, by weights[o * most ...];
// input pixel i is mixed into the output pixels from `begin[i]` to before `end[i]`.
struct Taps {
  int from, to, most;
  int *first, *count, *begin, *end;
  float *weights;
};

int most_taps(int from, int to, Filter filter) {
  // A filter covers twice its reach, and rounding must not make it one pixel more than there is room for.
  return 2 * support(filter) * (filter != kLinear && from > to ? divide_up(from, to) : 1) + 1;
}

size_t taps_bytes(int from, int to, Filter filter) {
  return sizeof(int) * 2 * (static_cast<size_t>(to) + from) + sizeof(float) * most_taps(from, to, filter) * to;
}

Taps taps_at(void *memory, int from, int to, Filter filter) {
  int most = most_taps(from, to, filter), *first = static_cast<int *>(memory), *begin = first + 2 * to;
  return Taps{from, to, most, first, first + to, begin, begin + from, reinterpret_cast<float *>(begin + 2 * from)};
}

// Where the filter of an output pixel lies: over the input pixels [first, end).
struct Reach {
  double centre, stretch;
  int first, end;

  __device__ Reach(const Taps &taps, int o, Filter filter) {
    double scale = static_cast<double>(taps.from) / taps.to;
    centre = scale * (o + 0.5);
    stretch = fmax(scale, 1.0);
    if (filter != kLinear) {
      double reach = support(filter) * stretch;
      first = static_cast<int>(fmax(centre - reach + 0.5, 0.0));
      end = min(min(static_cast<int>(centre + reach + 0.5), taps.from), first + taps.most);
    } else {
      first = min(static_cast<int>(fmax(centre - 0.5, 0.0)), taps.from - 1);
      end = min(first + 2, taps.from);
    }
  }
};

// The filter at a distance from its centre.
__device__ double value(Filter filter, double x) {
  if (filter == kTriangle) return fmax(1.0 - x, 0.0);
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

__device__ void fill_output(const Taps &taps, int o, Filter filter) {
  float *weights = taps.weights + static_cast<int64_t>(o) * taps.most;
  Reach at(taps, o, filter);
  taps.first[o] = at.first;
  taps.count[o] = at.end - at.first;
  if (filter != kLinear) {
    auto weight = [&](int i) { return value(filter, fabs((i - at.centre + 0.5) / at.stretch)); };
    double total = 0.0;
    for (int i = at.first; i < at.end; ++i) total += weight(i);
    for (int i = at.first; i < at.end; ++i) weights[i - at.first] = static_cast<float>(weight(i) / total);
  } else {
    double share = at.end - at.first == 2 ? fmax(at.centre - 0.5, 0.0) - at.first : 0.0;
    weights[0] = static_cast<float>(1.0 - share);
    weights[1] = static_cast<float>(share);
  }
}

// Filters move on with their centres, at scale (o + 0.5), and end less than reach + 1 from them: the output pixels of
// input pixel i are among those so near, and one more at either end. At the borders, where filters are cut, all are.
__device__ void fill_input(const Taps &taps, int i, Filter filter) {
  double scale = static_cast<double>(taps.from) / taps.to, reach = support(filter) * fmax(scale, 1.0) + 1.0;
  int begin = i == 0 ? 0 : max(static_cast<int>((i + 0.5 - reach) / scale - 0.5) - 1, 0);
  int end = i == taps.from - 1 ? taps.to : min(static_cast<int>((i + 0.5 + reach) / scale - 0.5) + 3, taps.to);
  auto holds = [&](int o) {
    Reach at(taps, o, filter);
    return at.first <= i && i < at.end;
  };
  while (begin < end && !holds(begin)) ++begin;
  while (begin < end && !holds(end - 1)) --end;
  taps.begin[i] = begin;
  taps.end[i] = end;
}

// One thread a pixel; blockIdx.y: the axis, and 2 more for input pixels.
__global__ void fill_taps(Taps vertical, Taps horizontal, Filter filter) {
  const Taps &taps = blockIdx.y % 2 == 0 ? vertical : horizontal;
  int pixel = blockIdx.x * blockDim.x + threadIdx.x;
  if (blockIdx.y < 2) {
    if (pixel < taps.to) fill_output(taps, pixel, filter);
  } else if (pixel < taps.from) {
    fill_input(taps, pixel, filter);
  }
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

// The weight of input pixel i in output pixel o, which mixes it.
__device__ __forceinline__ float weight_of(const Taps &taps, int o, int i) {
  return taps.weights[static_cast<int64_t>(o) * taps.most + i - taps.first[o]];
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
    int top = vertical.begin[row], bottom = vertical.end[row];
    int left = horizontal.begin[column], right = horizontal.end[column];
    float sum[V] = {};
    for (int a = top; a < bottom; ++a) {
      float down = weight_of(vertical, a, row);
      const T *line = dy + (sample * vertical.to + a) * horizontal.to * channels + c;
      float mixed[V] = {};
      for (int b = left; b < right; ++b) {
        float across = weight_of(horizontal, b, column);
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
           int new_width, int kind_of_filter, int dtype, void *workspace, cudaStream_t stream) {
  if (kind_of_filter < kLinear || kind_of_filter > kKeys) return -1;
  const Filter filter = static_cast<Filter>(kind_of_filter);
  if (count < 0 || height < 1 || width < 1 || channels < 1 || new_height < 1 || new_width < 1) return -1;
  Taps vertical = taps_at(workspace, height, new_height, filter);
  void *rest = static_cast<char *>(workspace) + taps_bytes(height, new_height, filter);
  Taps horizontal = taps_at(rest, width, new_width, filter);
  int longest = 1;
  for (int size : {height, width, new_height, new_width}) longest = size > longest ? size : longest;
  fill_taps<<<dim3(divide_up(longest, 64), 4), 64, 0, stream>>>(vertical, horizontal, filter);
  if (int error = launched()) return error;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(from, to), [&](auto kind) {
    using T = typename decltype(kind)::type;
    F<T> f{(const T *)from, (T *)to, vertical, horizontal, (unsigned)channels};
    return map<decltype(kind)::width>(f, count, stream);
  });
}

} // namespace

extern "C" size_t lcm_resize_bilinear_workspace(int height, int width, int new_height, int new_width, int filter) {
  if (height < 1 || width < 1 || new_height < 1 || new_width < 1 || filter < kLinear || filter > kKeys) return 0;
  const Filter kind = static_cast<Filter>(filter);
  return taps_bytes(height, new_height, kind) + taps_bytes(width, new_width, kind);
}

extern "C" int lcm_resize_bilinear_forward(const void *x, void *y, int64_t batch, int height, int width, int channels,
                                           int new_height, int new_width, int filter, int dtype, void *workspace,
                                           cudaStream_t stream) {
  return launch<Forward>(x, y, batch * new_height * new_width * channels, height, width, channels, new_height, new_width,
                         filter, dtype, workspace, stream);
}

extern "C" int lcm_resize_bilinear_backward(const void *dy, void *dx, int64_t batch, int height, int width,
                                            int channels, int new_height, int new_width, int filter, int dtype,
                                            void *workspace, cudaStream_t stream) {
  return launch<Backward>(dy, dx, batch * height * width * channels, height, width, channels, new_height, new_width,
                          filter, dtype, workspace, stream);
}
