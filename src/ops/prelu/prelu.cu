// The rectifier with a slope for every channel, one pack of channels a thread; the slopes' gradients are sums over rows
// in two deterministic stages.
#include "prelu.h"

#include "../columns.cuh"

using namespace lcm;

namespace {

// y = x > 0 ? of : slope of: the value where `of` is x, the gradient where it is dy.
template <class T>
struct Sloped {
  const T *x, *slope, *of;
  T *y;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    float a[V], b[V], slopes[V];
    load<V>(x + i, a);
    load<V>(of + i, b);
    load<V>(slope + c, slopes);
#pragma unroll
    for (int k = 0; k < V; ++k) b[k] = a[k] > 0.0f ? b[k] : slopes[k] * b[k];
    store<V>(y + i, b);
  }
};

template <class T>
struct SlopeSum {
  const T *x, *dy;
  int channels;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row, int c, float (&sums)[1][V]) const {
    float a[V], g[V];
    load<V>(x + row * channels + c, a);
    load<V>(dy + row * channels + c, g);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0][k] += a[k] > 0.0f ? 0.0f : a[k] * g[k];
  }
};

int sloped(const void *x, const void *slope, const void *of, void *y, int64_t rows, int channels, int dtype,
           cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, slope, of, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Sloped<T> f{(const T *)x, (const T *)slope, (const T *)of, (T *)y, (unsigned)channels};
    return map<decltype(kind)::width>(f, rows * channels, stream);
  });
}

} // namespace

extern "C" int lcm_prelu_forward(const void *x, const void *slope, void *y, int64_t rows, int channels, int dtype,
                                 cudaStream_t stream) {
  return sloped(x, slope, x, y, rows, channels, dtype, stream);
}

extern "C" int lcm_prelu_input_gradient(const void *x, const void *slope, const void *dy, void *dx, int64_t rows,
                                        int channels, int dtype, cudaStream_t stream) {
  return sloped(x, slope, dy, dx, rows, channels, dtype, stream);
}

extern "C" size_t lcm_prelu_workspace(int64_t rows, int channels) {
  return channels < 1 ? 0 : column_workspace(1, rows, channels, 1);
}

extern "C" int lcm_prelu_slope_gradient(const void *x, const void *dy, float *dslope, int64_t rows, int channels,
                                        int dtype, void *workspace, cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, dy), [&](auto kind) {
    using T = typename decltype(kind)::type;
    SlopeSum<T> sum{(const T *)x, (const T *)dy, channels};
    return column_sums<decltype(kind)::width, 1>(sum, 1, rows, channels, dslope, nullptr, workspace, stream);
  });
}
