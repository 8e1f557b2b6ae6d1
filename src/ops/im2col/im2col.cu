// Patches as rows, one pack a thread; the gradient gathers a pixel's places in a fixed order, without atomics.
#include "im2col.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

struct Shape {
  int height, width, channels, kernel_height, kernel_width, stride, padding, padding_end, out_height, out_width;
};

template <class T>
struct Patches {
  const T *x;
  T *patches;
  int64_t first; // output pixel
  Shape s;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t rest;
    unsigned c;
    split_index<V>(i, s.channels, rest, c);
    unsigned place = static_cast<unsigned>(rest);
    int kx = place % s.kernel_width;
    place /= s.kernel_width;
    int ky = place % s.kernel_height;
    unsigned index = static_cast<unsigned>(first) + place / s.kernel_height;
    int ox = index % s.out_width;
    index /= s.out_width;
    int oy = index % s.out_height;
    int64_t sample = index / s.out_height;
    int px = ox * s.stride + kx - s.padding, py = oy * s.stride + ky - s.padding;
    Pack<T, V> pack;
    if (px >= 0 && px < s.width && py >= 0 && py < s.height) {
      pack = load_pack<V>(x + ((sample * s.height + py) * s.width + px) * s.channels + c);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) pack.values[k] = T(0.0f);
    }
    *reinterpret_cast<Pack<T, V> *>(patches + i) = pack;
  }
};

template <class T>
struct Gather {
  const T *dpatches;
  T *dx;
  Shape s;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t rest;
    unsigned c;
    split_index<V>(i, s.channels, rest, c);
    unsigned index = static_cast<unsigned>(rest);
    int px = index % s.width;
    index /= s.width;
    int py = index % s.height;
    int64_t sample = index / s.height;
    float sum[V] = {};
    for (int ky = 0; ky < s.kernel_height; ++ky) {
      int down = py + s.padding - ky, oy = down / s.stride;
      if (down < 0 || oy * s.stride != down || oy >= s.out_height) continue;
      for (int kx = 0; kx < s.kernel_width; ++kx) {
        int across = px + s.padding - kx, ox = across / s.stride;
        if (across < 0 || ox * s.stride != across || ox >= s.out_width) continue;
        int64_t patch = (sample * s.out_height + oy) * s.out_width + ox;
        float values[V];
        load<V>(dpatches + ((patch * s.kernel_height + ky) * s.kernel_width + kx) * s.channels + c, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += values[k];
      }
    }
    store<V>(dx + i, sum);
  }
};

// The sizes with those of the output; false where there is none.
bool shape_of(Shape &s) {
  if (s.height < 1 || s.width < 1 || s.channels < 1 || s.kernel_height < 1 || s.kernel_width < 1 || s.stride < 1 ||
      s.padding < 0 || s.padding_end < 0)
    return false;
  int padding = s.padding + s.padding_end;
  int down = s.height + padding - s.kernel_height, across = s.width + padding - s.kernel_width;
  s.out_height = down / s.stride + 1;
  s.out_width = across / s.stride + 1;
  return down >= 0 && across >= 0;
}

} // namespace

extern "C" int lcm_im2col_forward(const void *x, void *patches, int64_t batch, int height, int width, int channels,
                                  int kernel_height, int kernel_width, int stride, int padding, int padding_end,
                                  int64_t first, int64_t pixels, int dtype, cudaStream_t stream) {
  Shape s{height, width, channels, kernel_height, kernel_width, stride, padding, padding_end};
  if (batch < 0 || !shape_of(s)) return -1;
  int64_t all = batch * s.out_height * s.out_width;
  if (first < 0 || pixels < 0 || first + pixels > all || all > 0xffffffffll) return -1;
  int64_t count = pixels * kernel_height * kernel_width * channels;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(x, patches), [&](auto kind) {
    using T = typename decltype(kind)::type;
    return map<decltype(kind)::width>(Patches<T>{(const T *)x, (T *)patches, first, s}, count, stream);
  });
}

extern "C" int lcm_im2col_backward(const void *dpatches, void *dx, int64_t batch, int height, int width, int channels,
                                   int kernel_height, int kernel_width, int stride, int padding, int padding_end,
                                   int dtype, cudaStream_t stream) {
  Shape s{height, width, channels, kernel_height, kernel_width, stride, padding, padding_end};
  if (batch < 0 || !shape_of(s)) return -1;
  int64_t count = batch * height * width * channels;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(dpatches, dx), [&](auto kind) {
    using T = typename decltype(kind)::type;
    return map<decltype(kind)::width>(Gather<T>{(const T *)dpatches, (T *)dx, s}, count, stream);
  });
}
