// Affine warping. Positions are computed in f64 from f64 matrices, as on the CPU: the share of a pixel is the fraction
// of a coordinate of up to some thousands, of which f32 would leave four digits.
//
// The gradient gathers: the output pixels that touch an input pixel are those whose position is less than 1 away on
// both
// axes, a parallelogram, of which the inverse of the matrix gives the rows and, row by row, two inequalities the
// columns.
// Each input pixel so visits hardly more output pixels than contribute, in a fixed order, and no atomics are needed.
#include "warp_affine.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

struct Position {
  double x, y;
};

// Fused multiply-adds are spelt out, so that forward and backward round alike.
__device__ __forceinline__ Position position_in_input(const double *m, int column, int row) {
  return {fma(m[0], column, fma(m[1], row, m[2])), fma(m[3], column, fma(m[4], row, m[5]))};
}

// Decomposes the index of a pack of (batch, height, width, channels).
template <int V>
__device__ __forceinline__ void position_of(int64_t i, unsigned height, unsigned width, unsigned channels,
                                            int64_t &sample, int &row, int &column, unsigned &c) {
  int64_t pixel;
  split_index<V>(i, channels, pixel, c);
  unsigned line = static_cast<unsigned>(pixel) / width;
  column = static_cast<int>(static_cast<unsigned>(pixel) - line * width);
  sample = line / height;
  row = static_cast<int>(line - static_cast<unsigned>(sample) * height);
}

template <class T>
struct Forward {
  const T *x;
  const double *matrices;
  T *y;
  int height, width, new_height, new_width;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t sample;
    int row, column;
    unsigned c;
    position_of<V>(i, new_height, new_width, channels, sample, row, column, c);
    Position at = position_in_input(matrices + sample * 6, column, row);
    double left = floor(at.x), top = floor(at.y);
    float sum[V] = {};
    if (left >= -1.0 && left < width && top >= -1.0 && top < height) {
      int x0 = static_cast<int>(left), y0 = static_cast<int>(top);
      double right_share = at.x - left, bottom_share = at.y - top;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        int px = x0 + corner % 2, py = y0 + corner / 2;
        double share = (corner / 2 ? bottom_share : 1.0 - bottom_share) * (corner % 2 ? right_share : 1.0 - right_share);
        if (share == 0.0 || px < 0 || px >= width || py < 0 || py >= height) continue;
        float weight = static_cast<float>(share), values[V];
        load<V>(x + ((sample * height + py) * width + px) * channels + c, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += values[k] * weight;
      }
    }
    store<V>(y + i, sum);
  }
};

// The share of pixel `pixel` in a value at position `at` of one axis.
__device__ __forceinline__ double share_of(double at, int pixel) {
  double low = floor(at);
  if (low == pixel) return 1.0 - (at - low);
  return low == pixel - 1.0 ? at - low : 0.0;
}

// Narrows [begin, end) to the whole numbers t with |slope t + offset| < 1, and up to one more at either end.
__device__ __forceinline__ void narrow(double slope, double offset, int &begin, int &end) {
  if (slope == 0.0) {
    if (fabs(offset) >= 1.0) end = begin;
    return;
  }
  double a = (-1.0 - offset) / slope, b = (1.0 - offset) / slope;
  double low = floor(fmin(a, b)), high = ceil(fmax(a, b)) + 1.0;
  if (low > begin) begin = low < end ? static_cast<int>(low) : end;
  if (high < end) end = high > begin ? static_cast<int>(high) : begin;
}

template <class T>
struct Backward {
  const T *dy;
  const double *matrices;
  T *dx;
  int height, width, new_height, new_width;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t sample;
    int row, column;
    unsigned c;
    position_of<V>(i, height, width, channels, sample, row, column, c);
    const double *m = matrices + sample * 6;
    // Rows: of the inverse, whose second line is (-m[3], m[0]) / determinant, over the square of half-width 1.
    int top = 0, bottom = new_height;
    double determinant = m[0] * m[4] - m[1] * m[3];
    double middle = (m[0] * (row - m[5]) - m[3] * (column - m[2])) / determinant;
    double reach = (fabs(m[0]) + fabs(m[3])) / fabs(determinant);
    if (isfinite(middle) && isfinite(reach)) { // else the matrix is singular, and every row is looked at
      double low = floor(middle - reach) - 1.0, high = ceil(middle + reach) + 2.0;
      if (low > top) top = low < bottom ? static_cast<int>(low) : bottom;
      if (high < bottom) bottom = high > top ? static_cast<int>(high) : top;
    }
    float sum[V] = {};
    for (int a = top; a < bottom; ++a) {
      int left = 0, right = new_width;
      narrow(m[0], fma(m[1], a, m[2]) - column, left, right);
      narrow(m[3], fma(m[4], a, m[5]) - row, left, right);
      for (int b = left; b < right; ++b) {
        Position at = position_in_input(m, b, a);
        double share = share_of(at.y, row) * share_of(at.x, column);
        if (share == 0.0) continue;
        float weight = static_cast<float>(share), values[V];
        load<V>(dy + ((sample * new_height + a) * new_width + b) * channels + c, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += values[k] * weight;
      }
    }
    store<V>(dx + i, sum);
  }
};

template <template <class> class F>
int launch(const void *from, const double *matrices, void *to, int64_t count, int height, int width, int channels,
           int new_height, int new_width, int dtype, cudaStream_t stream) {
  if (count < 0 || height < 1 || width < 1 || channels < 1 || new_height < 1 || new_width < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(from, to), [&](auto kind) {
    using T = typename decltype(kind)::type;
    F<T> f{(const T *)from, matrices, (T *)to, height, width, new_height, new_width, (unsigned)channels};
    return map<decltype(kind)::width>(f, count, stream);
  });
}

} // namespace

extern "C" int lcm_warp_affine_forward(const void *x, const double *matrices, void *y, int64_t batch, int height,
                                       int width, int channels, int new_height, int new_width, int dtype,
                                       cudaStream_t stream) {
  return launch<Forward>(x, matrices, y, batch * new_height * new_width * channels, height, width, channels, new_height,
                         new_width, dtype, stream);
}

extern "C" int lcm_warp_affine_backward(const void *dy, const double *matrices, void *dx, int64_t batch, int height,
                                        int width, int channels, int new_height, int new_width, int dtype,
                                        cudaStream_t stream) {
  return launch<Backward>(dy, matrices, dx, batch * height * width * channels, height, width, channels, new_height,
                          new_width, dtype, stream);
}
