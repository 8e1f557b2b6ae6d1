// Maximum pooling: a thread takes one pack of channels of a pixel.
//
// The gradient is gathered: an input pixel looks for the largest value of every window it lies in, and takes the
// window's gradient where that is itself. That reads some values again, from the cache, and needs neither atomics nor
// memory for indices.
#include "max_pool2d.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

struct Sizes {
  unsigned height, width, channels, kernel, stride, out_height, out_width;
};

// The largest values of the window that begins at `from`, and where in the window the first of them lie.
template <int V, class T>
__device__ __forceinline__ void largest(const T *from, const Sizes &sizes, float (&most)[V], unsigned (&place)[V]) {
  load<V>(from, most);
#pragma unroll
  for (int k = 0; k < V; ++k) place[k] = 0;
  for (unsigned at = 1; at < sizes.kernel * sizes.kernel; ++at) {
    unsigned dy = at / sizes.kernel, dx = at - dy * sizes.kernel;
    float values[V];
    load<V>(from + (static_cast<int64_t>(dy) * sizes.width + dx) * sizes.channels, values);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      // NaN wins and stays.
      if (values[k] > most[k] || (isnan(values[k]) && !isnan(most[k]))) {
        most[k] = values[k];
        place[k] = at;
      }
    }
  }
}

template <class T>
struct Value {
  const T *x;
  T *y;
  Sizes sizes;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t pixel;
    unsigned c;
    split_index<V>(i, sizes.channels, pixel, c);
    unsigned row = static_cast<unsigned>(pixel) / sizes.out_width, column = static_cast<unsigned>(pixel) % sizes.out_width;
    unsigned sample = row / sizes.out_height;
    row -= sample * sizes.out_height;
    int64_t first = (static_cast<int64_t>(sample) * sizes.height + row * sizes.stride) * sizes.width + column * sizes.stride;
    float most[V];
    unsigned place[V];
    largest<V>(x + first * sizes.channels + c, sizes, most, place);
    store<V>(y + i, most);
  }
};

template <class T>
struct Gradient {
  const T *x, *dy;
  T *dx;
  Sizes sizes;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t pixel;
    unsigned c;
    split_index<V>(i, sizes.channels, pixel, c);
    unsigned row = static_cast<unsigned>(pixel) / sizes.width, column = static_cast<unsigned>(pixel) % sizes.width;
    unsigned sample = row / sizes.height;
    row -= sample * sizes.height;
    // The windows that the pixel lies in: from the first that reaches it to the last that begins at or before it.
    auto first = [&](unsigned at) { return at < sizes.kernel ? 0 : (at - sizes.kernel) / sizes.stride + 1; };
    unsigned last_row = min(row / sizes.stride, sizes.out_height - 1), last_column = min(column / sizes.stride, sizes.out_width - 1);
    float sum[V] = {};
    for (unsigned oy = first(row); oy <= last_row; ++oy) {
      for (unsigned ox = first(column); ox <= last_column; ++ox) {
        unsigned top = oy * sizes.stride, left = ox * sizes.stride, own = (row - top) * sizes.kernel + column - left;
        float most[V], g[V];
        unsigned place[V];
        int64_t start = (static_cast<int64_t>(sample) * sizes.height + top) * sizes.width + left;
        largest<V>(x + start * sizes.channels + c, sizes, most, place);
        load<V>(dy + ((static_cast<int64_t>(sample) * sizes.out_height + oy) * sizes.out_width + ox) * sizes.channels + c, g);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += place[k] == own ? g[k] : 0.0f;
      }
    }
    store<V>(dx + i, sum);
  }
};

bool sizes_of(int64_t batch, int height, int width, int channels, int kernel, int stride, Sizes &sizes) {
  if (batch < 0 || channels < 1 || kernel < 1 || stride < 1 || height < kernel || width < kernel) return false;
  if (batch * height * width >= (1ll << 32)) return false; // pixels are counted in 32 bits
  sizes = Sizes{(unsigned)height, (unsigned)width, (unsigned)channels, (unsigned)kernel, (unsigned)stride,
                (unsigned)((height - kernel) / stride + 1), (unsigned)((width - kernel) / stride + 1)};
  return true;
}

} // namespace

extern "C" int lcm_max_pool2d_forward(const void *x, void *y, int64_t batch, int height, int width, int channels,
                                      int kernel, int stride, int dtype, cudaStream_t stream) {
  Sizes sizes;
  if (!sizes_of(batch, height, width, channels, kernel, stride, sizes)) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    int64_t count = batch * sizes.out_height * sizes.out_width * channels;
    return map<decltype(kind)::width>(Value<T>{(const T *)x, (T *)y, sizes}, count, stream);
  });
}

extern "C" int lcm_max_pool2d_backward(const void *x, const void *dy, void *dx, int64_t batch, int height, int width,
                                       int channels, int kernel, int stride, int dtype, cudaStream_t stream) {
  Sizes sizes;
  if (!sizes_of(batch, height, width, channels, kernel, stride, sizes)) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, dy, dx), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Gradient<T> f{(const T *)x, (const T *)dy, (T *)dx, sizes};
    return map<decltype(kind)::width>(f, batch * height * width * channels, stream);
  });
}
