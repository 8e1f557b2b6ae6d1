// The gated GELU: a thread takes one pack of each half of a row.
#include "geglu.h"

#include "../activation/activation.cuh"

using namespace lcm;

namespace {

template <class T>
struct Value {
  const T *x;
  T *y;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    const T *from = x + row * 2 * channels + c;
    float a[V], b[V];
    load<V>(from, a);
    load<V>(from + channels, b);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] *= b[k] * normal_distribution(b[k]);
    store<V>(y + i, a);
  }
};

template <class T>
struct Gradient {
  const T *x, *dy;
  T *dx;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    int64_t offset = row * 2 * channels + c;
    float a[V], b[V], g[V];
    load<V>(x + offset, a);
    load<V>(x + offset + channels, b);
    load<V>(dy + i, g);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      float phi = normal_distribution(b[k]);
      float slope = phi + b[k] * normal_density<kPrecise<T>>(b[k]);
      float da = g[k] * b[k] * phi;
      b[k] = g[k] * a[k] * slope;
      a[k] = da;
    }
    store<V>(dx + offset, a);
    store<V>(dx + offset + channels, b);
  }
};

} // namespace

extern "C" int lcm_geglu_forward(const void *x, void *y, int64_t rows, int channels, int dtype, cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Value<T> f{(const T *)x, (T *)y, (unsigned)channels};
    return map<decltype(kind)::width>(f, rows * channels, stream);
  });
}

extern "C" int lcm_geglu_backward(const void *x, const void *dy, void *dx, int64_t rows, int channels, int dtype,
                                  cudaStream_t stream) {
  if (rows < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, dy, dx), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Gradient<T> f{(const T *)x, (const T *)dy, (T *)dx, (unsigned)channels};
    return map<decltype(kind)::width>(f, rows * channels, stream);
  });
}
