// A factor and a term for every channel, one pack of channels a thread; the parameters' gradients are sums over rows in
// two deterministic stages.
#include "channel_affine.h"

#include "../columns.cuh"

using namespace lcm;

namespace {

template <class T>
struct Value {
  const T *x, *scale, *shift; // shift may be null: none
  T *y;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    float a[V], factor[V], term[V] = {};
    load<V>(x + i, a);
    load<V>(scale + c, factor);
    if (shift) load<V>(shift + c, term);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = fmaf(a[k], factor[k], term[k]);
    store<V>(y + i, a);
  }
};

template <class T>
struct Sums {
  const T *x, *dy;
  int channels;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row, int c, float (&sums)[2][V]) const {
    float a[V], g[V];
    load<V>(x + row * channels + c, a);
    load<V>(dy + row * channels + c, g);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sums[0][k] += a[k] * g[k];
      sums[1][k] += g[k];
    }
  }
};

int transform(const void *x, const void *scale, const void *shift, void *y, int64_t rows, int channels, int dtype,
              cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, scale, shift, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Value<T> f{(const T *)x, (const T *)scale, (const T *)shift, (T *)y, (unsigned)channels};
    return map<decltype(kind)::width>(f, rows * channels, stream);
  });
}

} // namespace

extern "C" int lcm_channel_affine_forward(const void *x, const void *scale, const void *shift, void *y, int64_t rows,
                                          int channels, int dtype, cudaStream_t stream) {
  return transform(x, scale, shift, y, rows, channels, dtype, stream);
}

extern "C" int lcm_channel_affine_input_gradient(const void *dy, const void *scale, void *dx, int64_t rows, int channels,
                                                 int dtype, cudaStream_t stream) {
  return transform(dy, scale, nullptr, dx, rows, channels, dtype, stream);
}

extern "C" size_t lcm_channel_affine_workspace(int64_t rows, int channels) {
  return channels < 1 ? 0 : column_workspace(1, rows, channels, 2);
}

extern "C" int lcm_channel_affine_parameter_gradients(const void *x, const void *dy, float *dscale, float *dshift,
                                                      int64_t rows, int channels, int dtype, void *workspace,
                                                      cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, dy), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Sums<T> sums{(const T *)x, (const T *)dy, channels};
    return column_sums<decltype(kind)::width, 2>(sums, 1, rows, channels, dscale, dshift, workspace, stream);
  });
}
