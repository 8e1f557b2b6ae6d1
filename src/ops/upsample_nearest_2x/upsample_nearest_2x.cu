// Doubling by repetition: a thread takes one pack of one small pixel, and writes or reads its four copies.
#include "upsample_nearest_2x.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

template <class T, bool backward>
struct Double {
  const T *from;
  T *to;
  unsigned width, channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t pixel;
    unsigned c;
    split_index<V>(i, channels, pixel, c);
    unsigned line = static_cast<unsigned>(pixel) / width, column = static_cast<unsigned>(pixel) - line * width;
    int64_t above = (static_cast<int64_t>(line) * 4 * width + 2 * column) * channels + c;
    int64_t below = above + 2ll * width * channels;
    if constexpr (backward) {
      float a[V], b[V], c2[V], d[V];
      load<V>(from + above, a);
      load<V>(from + above + channels, b);
      load<V>(from + below, c2);
      load<V>(from + below + channels, d);
#pragma unroll
      for (int k = 0; k < V; ++k) a[k] = (a[k] + b[k]) + (c2[k] + d[k]);
      store<V>(to + i, a);
    } else {
      Pack<T, V> pack = load_pack<V>(from + i);
      *reinterpret_cast<Pack<T, V> *>(to + above) = pack;
      *reinterpret_cast<Pack<T, V> *>(to + above + channels) = pack;
      *reinterpret_cast<Pack<T, V> *>(to + below) = pack;
      *reinterpret_cast<Pack<T, V> *>(to + below + channels) = pack;
    }
  }
};

template <bool backward>
int launch(const void *from, void *to, int64_t batch, int height, int width, int channels, int dtype,
           cudaStream_t stream) {
  if (batch < 0 || height < 0 || width < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(from, to), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Double<T, backward> f{(const T *)from, (T *)to, (unsigned)width, (unsigned)channels};
    return map<decltype(kind)::width>(f, batch * height * width * channels, stream);
  });
}

} // namespace

extern "C" int lcm_upsample_nearest_2x_forward(const void *x, void *y, int64_t batch, int height, int width,
                                               int channels, int dtype, cudaStream_t stream) {
  return launch<false>(x, y, batch, height, width, channels, dtype, stream);
}

extern "C" int lcm_upsample_nearest_2x_backward(const void *dy, void *dx, int64_t batch, int height, int width,
                                                int channels, int dtype, cudaStream_t stream) {
  return launch<true>(dy, dx, batch, height, width, channels, dtype, stream);
}
