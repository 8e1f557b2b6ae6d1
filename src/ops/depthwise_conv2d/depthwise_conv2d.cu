// Depthwise convolution: a thread takes one pack of channels of a pixel and goes over the taps. The pictures these
// networks see are small (faces of 112 pixels), so the taps' values come from the cache.
//
// The input's gradient gathers as the forward pass does; the weights' is, for each tap, a sum over the output's pixels
// in two deterministic stages.
#include "depthwise_conv2d.h"

#include "../columns.cuh"

using namespace lcm;

namespace {

struct Sizes {
  int height, width, channels, kernel_height, kernel_width, stride, padding, out_height, out_width;
  int64_t batch;

  explicit Sizes(const LcmDepthwiseConv2d &s)
      : height(s.height), width(s.width), channels(s.channels), kernel_height(s.kernel_height),
        kernel_width(s.kernel_width), stride(s.stride), padding(s.padding),
        out_height((s.height + 2 * s.padding - s.kernel_height) / (s.stride > 0 ? s.stride : 1) + 1),
        out_width((s.width + 2 * s.padding - s.kernel_width) / (s.stride > 0 ? s.stride : 1) + 1), batch(s.batch) {}

  int64_t out_pixels() const { return batch * out_height * out_width; }
  int64_t pixels() const { return batch * height * width; }

  // Pixels are counted in 32 bits.
  bool taken() const {
    return batch >= 0 && channels >= 1 && kernel_height >= 1 && kernel_width >= 1 && stride >= 1 && padding >= 0 &&
           kernel_height <= height + 2 * padding && kernel_width <= width + 2 * padding && pixels() < (1ll << 31) &&
           out_pixels() < (1ll << 31);
  }
};

// Splits the number of a pixel of images of `height` by `width`.
__device__ __forceinline__ void split_pixel(int64_t pixel, int height, int width, int &sample, int &row, int &column) {
  unsigned p = static_cast<unsigned>(pixel), line = p / width;
  column = static_cast<int>(p - line * width);
  sample = static_cast<int>(line / height);
  row = static_cast<int>(line - static_cast<unsigned>(sample) * height);
}

template <class T>
struct Value {
  const T *x, *weight, *bias;
  T *y;
  Sizes s;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t pixel;
    unsigned c;
    int sample, row, column;
    split_index<V>(i, s.channels, pixel, c);
    split_pixel(pixel, s.out_height, s.out_width, sample, row, column);
    float sum[V] = {};
    if (bias) load<V>(bias + c, sum);
    for (int ky = 0; ky < s.kernel_height; ++ky) {
      int from_row = row * s.stride + ky - s.padding;
      if (from_row < 0 || from_row >= s.height) continue;
      const T *line = x + (static_cast<int64_t>(sample) * s.height + from_row) * s.width * s.channels + c;
      for (int kx = 0; kx < s.kernel_width; ++kx) {
        int from_column = column * s.stride + kx - s.padding;
        if (from_column < 0 || from_column >= s.width) continue;
        float a[V], w[V];
        load<V>(line + static_cast<int64_t>(from_column) * s.channels, a);
        load<V>(weight + static_cast<int64_t>(ky * s.kernel_width + kx) * s.channels + c, w);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] = fmaf(a[k], w[k], sum[k]);
      }
    }
    store<V>(y + i, sum);
  }
};

template <class T>
struct InputGradient {
  const T *dy, *weight;
  T *dx;
  Sizes s;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t pixel;
    unsigned c;
    int sample, row, column;
    split_index<V>(i, s.channels, pixel, c);
    split_pixel(pixel, s.height, s.width, sample, row, column);
    float sum[V] = {};
    for (int ky = 0; ky < s.kernel_height; ++ky) {
      int to_row = row + s.padding - ky;
      if (to_row < 0 || to_row % s.stride != 0 || to_row / s.stride >= s.out_height) continue;
      const T *line = dy + (static_cast<int64_t>(sample) * s.out_height + to_row / s.stride) * s.out_width * s.channels + c;
      for (int kx = 0; kx < s.kernel_width; ++kx) {
        int to_column = column + s.padding - kx;
        if (to_column < 0 || to_column % s.stride != 0 || to_column / s.stride >= s.out_width) continue;
        float g[V], w[V];
        load<V>(line + static_cast<int64_t>(to_column / s.stride) * s.channels, g);
        load<V>(weight + static_cast<int64_t>(ky * s.kernel_width + kx) * s.channels + c, w);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] = fmaf(g[k], w[k], sum[k]);
      }
    }
    store<V>(dx + i, sum);
  }
};

// The rows are the pixels of the output, once for every tap.
template <class T>
struct WeightSum {
  const T *x, *dy;
  Sizes s;
  int64_t rows;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row_of_all, int c, float (&sums)[1][V]) const {
    int tap = static_cast<int>(row_of_all / rows);
    int64_t pixel = row_of_all - tap * rows;
    int sample, row, column;
    split_pixel(pixel, s.out_height, s.out_width, sample, row, column);
    int ky = tap / s.kernel_width, kx = tap - ky * s.kernel_width;
    int from_row = row * s.stride + ky - s.padding, from_column = column * s.stride + kx - s.padding;
    if (from_row < 0 || from_row >= s.height || from_column < 0 || from_column >= s.width) return;
    float a[V], g[V];
    load<V>(x + ((static_cast<int64_t>(sample) * s.height + from_row) * s.width + from_column) * s.channels + c, a);
    load<V>(dy + pixel * s.channels + c, g);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0][k] += a[k] * g[k];
  }
};

} // namespace

extern "C" int lcm_depthwise_conv2d_forward(const void *x, const void *weight, const void *bias, void *y,
                                            const LcmDepthwiseConv2d *sizes, cudaStream_t stream) {
  Sizes s(*sizes);
  if (!s.taken()) return -1;
  bool packs = s.channels % wide(sizes->dtype) == 0 && aligned(x, weight, bias, y);
  return dispatch(sizes->dtype, packs, [&](auto kind) {
    using T = typename decltype(kind)::type;
    Value<T> f{(const T *)x, (const T *)weight, (const T *)bias, (T *)y, s};
    return map<decltype(kind)::width>(f, s.out_pixels() * s.channels, stream);
  });
}

extern "C" int lcm_depthwise_conv2d_input_gradient(const void *dy, const void *weight, void *dx,
                                                   const LcmDepthwiseConv2d *sizes, cudaStream_t stream) {
  Sizes s(*sizes);
  if (!s.taken()) return -1;
  bool packs = s.channels % wide(sizes->dtype) == 0 && aligned(dy, weight, dx);
  return dispatch(sizes->dtype, packs, [&](auto kind) {
    using T = typename decltype(kind)::type;
    InputGradient<T> f{(const T *)dy, (const T *)weight, (T *)dx, s};
    return map<decltype(kind)::width>(f, s.pixels() * s.channels, stream);
  });
}

extern "C" size_t lcm_depthwise_conv2d_workspace(const LcmDepthwiseConv2d *sizes) {
  Sizes s(*sizes);
  return s.taken() ? column_workspace(s.kernel_height * s.kernel_width, s.out_pixels(), s.channels, 1) : 0;
}

extern "C" int lcm_depthwise_conv2d_weight_gradient(const void *x, const void *dy, float *dweight,
                                                    const LcmDepthwiseConv2d *sizes, void *workspace,
                                                    cudaStream_t stream) {
  Sizes s(*sizes);
  if (!s.taken()) return -1;
  bool packs = s.channels % wide(sizes->dtype) == 0 && aligned(x, dy);
  return dispatch(sizes->dtype, packs, [&](auto kind) {
    using T = typename decltype(kind)::type;
    WeightSum<T> sum{(const T *)x, (const T *)dy, s, s.out_pixels()};
    int taps = s.kernel_height * s.kernel_width;
    return column_sums<decltype(kind)::width, 1>(sum, taps, s.out_pixels(), s.channels, dweight, nullptr, workspace, stream);
  });
}
