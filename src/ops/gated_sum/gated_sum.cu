// Channels weighed sample by sample, and the mean that the weights come from: one pack of channels a thread; sums over
// pixels in two deterministic stages, rounded to the dtype once.
#include "gated_sum.h"

#include "../columns.cuh"

using namespace lcm;

namespace {

__device__ __forceinline__ float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = x logistic(logits) + addend; without an addend where that is null.
template <class T>
struct Gated {
  const T *x, *logits, *addend;
  T *y;
  unsigned pixels, channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    float a[V], gate[V], rest[V] = {};
    load<V>(x + i, a);
    load<V>(logits + static_cast<int64_t>(static_cast<unsigned>(row) / pixels) * channels + c, gate);
    if (addend) load<V>(addend + i, rest);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = fmaf(a[k], logistic(gate[k]), rest[k]);
    store<V>(y + i, a);
  }
};

// out = v factor, v one vector a sample.
template <class T>
struct Spread {
  const T *v;
  T *out;
  float factor;
  unsigned pixels, channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    float a[V];
    load<V>(v + static_cast<int64_t>(static_cast<unsigned>(row) / pixels) * channels + c, a);
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] *= factor;
    store<V>(out + i, a);
  }
};

// Sums of x, or of x dy where that is not null.
template <class T>
struct Sums {
  const T *x, *dy;
  int channels;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t row, int c, float (&sums)[1][V]) const {
    float a[V], g[V];
    load<V>(x + row * channels + c, a);
    if (dy) {
      load<V>(dy + row * channels + c, g);
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] *= g[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sums[0][k] += a[k];
  }
};

// out = sums factor, times logistic'(logits) where these are not null.
template <class T>
struct Finish {
  const float *sums;
  const T *logits;
  T *out;
  float factor;
  template <int V>
  __device__ void at(int64_t i) const {
    float a[V], gate[V];
    load<V>(sums + i, a);
    if (logits) load<V>(logits + i, gate);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      a[k] *= factor;
      if (logits) {
        float g = logistic(gate[k]);
        a[k] *= g * (1.0f - g);
      }
    }
    store<V>(out + i, a);
  }
};

bool fits(int64_t batch, int64_t pixels, int channels) {
  // Rows are counted in 32 bits.
  return batch >= 0 && pixels >= 1 && channels >= 1 && batch * pixels < (1ll << 31);
}

int gated(const void *x, const void *logits, const void *addend, void *y, int64_t batch, int64_t pixels, int channels,
          int dtype, cudaStream_t stream) {
  if (!fits(batch, pixels, channels)) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, logits, addend, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Gated<T> f{(const T *)x, (const T *)logits, (const T *)addend, (T *)y, (unsigned)pixels, (unsigned)channels};
    return map<decltype(kind)::width>(f, batch * pixels * channels, stream);
  });
}

int summed(const void *x, const void *dy, const void *logits, float *sums, void *out, float factor, int64_t batch,
           int64_t pixels, int channels, int dtype, void *workspace, cudaStream_t stream) {
  if (!fits(batch, pixels, channels)) return -1;
  if (batch == 0) return 0;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, dy, logits, sums, out), [&](auto kind) {
    using T = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    Sums<T> of{(const T *)x, (const T *)dy, channels};
    if (int error = column_sums<V, 1>(of, batch, pixels, channels, sums, nullptr, workspace, stream)) return error;
    Finish<T> finish{sums, (const T *)logits, (T *)out, factor};
    return map<V>(finish, batch * channels, stream);
  });
}

} // namespace

extern "C" int lcm_gated_sum_forward(const void *x, const void *logits, const void *addend, void *y, int64_t batch,
                                     int64_t pixels, int channels, int dtype, cudaStream_t stream) {
  return addend ? gated(x, logits, addend, y, batch, pixels, channels, dtype, stream) : -1;
}

extern "C" int lcm_gated_sum_input_gradient(const void *dy, const void *logits, void *dx, int64_t batch,
                                            int64_t pixels, int channels, int dtype, cudaStream_t stream) {
  return gated(dy, logits, nullptr, dx, batch, pixels, channels, dtype, stream);
}

extern "C" size_t lcm_gated_sum_workspace(int64_t batch, int64_t pixels, int channels) {
  return fits(batch, pixels, channels) && batch > 0 ? column_workspace(batch, pixels, channels, 1) : 0;
}

extern "C" int lcm_gated_sum_logit_gradient(const void *x, const void *dy, const void *logits, float *sums,
                                            void *dlogits, int64_t batch, int64_t pixels, int channels, int dtype,
                                            void *workspace, cudaStream_t stream) {
  if (!dy || !logits) return -1;
  return summed(x, dy, logits, sums, dlogits, 1.0f, batch, pixels, channels, dtype, workspace, stream);
}

extern "C" int lcm_mean_pixels(const void *x, float *sums, void *out, int64_t batch, int64_t pixels, int channels,
                               int dtype, void *workspace, cudaStream_t stream) {
  float share = pixels < 1 ? 0.0f : 1.0f / static_cast<float>(pixels);
  return summed(x, nullptr, nullptr, sums, out, share, batch, pixels, channels, dtype, workspace, stream);
}

extern "C" int lcm_spread_over_pixels(const void *v, void *out, float factor, int64_t batch, int64_t pixels,
                                      int channels, int dtype, cudaStream_t stream) {
  if (!fits(batch, pixels, channels)) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(v, out), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Spread<T> f{(const T *)v, (T *)out, factor, (unsigned)pixels, (unsigned)channels};
    return map<decltype(kind)::width>(f, batch * pixels * channels, stream);
  });
}
