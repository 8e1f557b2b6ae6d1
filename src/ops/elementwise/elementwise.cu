// Sums and scalings, one pack a thread; sums over pixels in two deterministic stages.
#include "elementwise.h"

#include "../columns.cuh"

using namespace lcm;

namespace {

// out = alpha a + beta b; b may be null.
template <class T>
struct Combine {
  const T *a, *b;
  T *out;
  float alpha, beta;
  template <int V>
  __device__ void at(int64_t i) const {
    float x[V], y[V] = {};
    load<V>(a + i, x);
    if (b) load<V>(b + i, y);
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = b ? alpha * x[k] + beta * y[k] : alpha * x[k];
    store<V>(out + i, x);
  }
};

// out = x + v[sample], where a sample has `pixels` rows of `channels`.
template <class T>
struct AddChannels {
  const T *x, *v;
  T *out;
  int64_t pixels;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    unsigned sample = static_cast<unsigned>(row) / static_cast<unsigned>(pixels);
    float a[V], b[V];
    load<V>(x + i, a);
    load<V>(v + static_cast<int64_t>(sample) * channels + c, b);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] += b[k];
    store<V>(out + i, a);
  }
};

template <class T>
struct RowSum {
  const T *x;
  int channels;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row, int c, float (&sums)[1][V]) const {
    float values[V];
    load<V>(x + row * channels + c, values);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0][i] += values[i];
  }
};

} // namespace

extern "C" int lcm_elementwise_combine(const void *a, const void *b, void *out, float alpha, float beta, int64_t count,
                                       int dtype, cudaStream_t stream) {
  return dispatch(dtype, aligned(a, b, out), [&](auto kind) {
    using T = typename decltype(kind)::type;
    return map<decltype(kind)::width>(Combine<T>{(const T *)a, (const T *)b, (T *)out, alpha, beta}, count, stream);
  });
}

extern "C" int lcm_elementwise_add(const void *a, const void *b, void *out, int64_t count, int dtype,
                                   cudaStream_t stream) {
  return b ? lcm_elementwise_combine(a, b, out, 1.0f, 1.0f, count, dtype, stream) : -1;
}

extern "C" int lcm_elementwise_add_channels(const void *x, const void *v, void *out, int64_t batch, int64_t pixels,
                                            int channels, int dtype, cudaStream_t stream) {
  if (batch < 0 || pixels < 0 || channels < 1 || pixels >= (1ll << 31)) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, v, out), [&](auto kind) {
    using T = typename decltype(kind)::type;
    AddChannels<T> f{(const T *)x, (const T *)v, (T *)out, pixels, (unsigned)channels};
    return map<decltype(kind)::width>(f, batch * pixels * channels, stream);
  });
}

extern "C" size_t lcm_elementwise_sum_pixels_workspace(int64_t batch, int64_t pixels, int channels) {
  return batch < 1 || channels < 1 ? 0 : column_workspace(batch, pixels, channels, 1);
}

extern "C" int lcm_elementwise_sum_pixels(const void *x, float *out, int64_t batch, int64_t pixels, int channels,
                                          int dtype, void *workspace, cudaStream_t stream) {
  if (batch < 0 || pixels < 0 || channels < 1) return -1;
  if (batch == 0) return 0;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x), [&](auto kind) {
    using T = typename decltype(kind)::type;
    RowSum<T> sum{(const T *)x, channels};
    return column_sums<decltype(kind)::width, 1>(sum, batch, pixels, channels, out, nullptr, workspace, stream);
  });
}
