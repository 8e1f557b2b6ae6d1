// Convolution and the gradient of its input on Hopper, as implicit matrix products (../hopper_gemm.h): bf16 and f16, channels in
// multiples of 8, kernels up to 5 x 5, strides 1 and 2.
//
// A convolution of stride 2 reads x as four images, one per parity of row and column, each by its own tensor map: under a tap
// the pixels of a box are then neighbours. The gradient of the input mirrors the taps, and reads the weights in place as a
// (K, columns) matrix per tap; with stride 2 the four parities of dx's pixels are four products with their own taps each.
#include "conv2d.h"
#include "../hopper_gemm.h"
#include <math.h>

using namespace hopper_gemm;

namespace {

struct Shape {
  int batch, height, width, input_channels, output_channels, kernel, stride, padding, padding_end;
  int out_height, out_width;
};

int floor_div(int a, int b) { return (a - ((a % b) + b) % b) / b; }

// Fills in the parts of the problem that both directions share, and starts it. `source` is x, or dy for the gradient.
int run(Problem &p, const Shape &s, bool gradient, int phases, const void *source, const void *weight, bool half, cudaStream_t stream) {
  const int multiprocessors = hopper_multiprocessors();
  if (!multiprocessors) return -1;
  int box[4];
  const Plan plan = cut(p, phases, gradient, multiprocessors, box);
  const int channels = gradient ? s.output_channels : s.input_channels;
  const int height = gradient ? s.out_height : s.height, width = gradient ? s.out_width : s.width, parities = gradient ? 1 : s.stride;
  for (int y = 0; y < parities; ++y)
    for (int x = 0; x < parities; ++x) {
      const char *base = static_cast<const char *>(source) + 2ll * channels * (static_cast<int64_t>(y) * width + x);
      const int64_t sizes[4] = {channels, (width - x + parities - 1) / parities, (height - y + parities - 1) / parities, s.batch};
      const int64_t strides[3] = {static_cast<int64_t>(channels) * parities, static_cast<int64_t>(channels) * width * parities, static_cast<int64_t>(channels) * width * height};
      if (!encode(&p.a[y * parities + x], half, 4, base, sizes, strides, box)) return -1;
    }
  if (!encode_weights(&p.b[0], p, plan, half, gradient, weight, s.input_channels, s.kernel * s.kernel, s.output_channels)) return -1;
  return launch(p, plan, gradient, half, multiprocessors, stream);
}

bool accepts(Shape &s, int dtype) {
  if (dtype != 1 && dtype != 2) return false;
  if (s.kernel < 1 || s.kernel > 5 || s.stride < 1 || s.stride > 2 || s.padding < 0 || s.padding_end < 0 || s.height < s.stride || s.width < s.stride || s.batch < 1) return false;
  if (s.input_channels % 8 || s.output_channels % 8 || s.input_channels < 8 || s.output_channels < 8) return false;
  const int padding = s.padding + s.padding_end;
  if (s.height + padding < s.kernel || s.width + padding < s.kernel) return false;
  s.out_height = (s.height + padding - s.kernel) / s.stride + 1;
  s.out_width = (s.width + padding - s.kernel) / s.stride + 1;
  return true;
}

} // namespace

extern "C" int lcm_conv2d_forward_hopper(const LcmConv2d *c, cudaStream_t stream) {
  Shape s = {c->batch, c->height, c->width, c->input_channels, c->output_channels, c->kernel, c->stride, c->padding, c->padding_end, 0, 0};
  if (!accepts(s, c->dtype) || !aligned(c->x) || !aligned(c->weight) || !aligned(c->y) || !aligned(c->residual)) return -1;
  Problem p = {};
  p.y = c->y, p.bias = c->bias, p.sample_bias = c->per_sample_bias, p.residual = c->residual, p.floor = c->rectified ? 0 : -INFINITY;
  p.columns = s.output_channels, p.samples = s.batch, p.height = s.out_height, p.width = s.out_width, p.stride = 1;
  p.y_row = p.residual_row = s.output_channels;
  const int steps = (s.input_channels + kDepth - 1) / kDepth;
  int taps = 0;
  for (int y = 0; y < s.kernel; ++y)
    for (int x = 0; x < s.kernel; ++x) {
      int dy = floor_div(y - s.padding, s.stride), dx = floor_div(x - s.padding, s.stride);
      int map = (y - s.padding - dy * s.stride) * s.stride + (x - s.padding - dx * s.stride);
      p.taps[taps++] = Tap{static_cast<int16_t>(map), 0, static_cast<int16_t>(dy), static_cast<int16_t>(dx), static_cast<int16_t>(y * s.kernel + x), static_cast<int16_t>(steps)};
    }
  p.first_tap[1] = taps, p.steps[0] = taps * steps;
  return run(p, s, false, 1, c->x, c->weight, c->dtype == 2, stream);
}

extern "C" int lcm_conv2d_input_gradient_hopper(const LcmConv2dInputGradient *c, cudaStream_t stream) {
  Shape s = {c->batch, c->height, c->width, c->input_channels, c->output_channels, c->kernel, c->stride, c->padding, c->padding_end, 0, 0};
  if (!accepts(s, c->dtype) || !aligned(c->dy) || !aligned(c->weight) || !aligned(c->dx) || !aligned(c->residual) || !aligned(c->gate) || (c->residual && c->gate)) return -1;
  Problem p = {};
  p.y = c->dx, p.residual = c->gate ? c->gate : c->residual, p.gate = c->gate != nullptr, p.floor = -INFINITY;
  p.columns = s.input_channels, p.samples = s.batch, p.height = s.height, p.width = s.width, p.stride = s.stride;
  p.y_row = p.residual_row = s.input_channels;
  const int steps = (s.output_channels + kDepth - 1) / kDepth, phases = s.stride * s.stride;
  // The odd pixels of a 3 x 3 convolution with stride 2 have the most taps: longest phases first.
  int taps = 0;
  for (int phase = 0; phase < phases; ++phase) {
    int py = s.stride - 1 - phase / s.stride, px = s.stride - 1 - phase % s.stride;
    p.phase_y[phase] = py, p.phase_x[phase] = px;
    p.first_tap[phase] = taps;
    for (int y = (py + s.padding) % s.stride; y < s.kernel; y += s.stride)
      for (int x = (px + s.padding) % s.stride; x < s.kernel; x += s.stride)
        p.taps[taps++] = Tap{0, 0, static_cast<int16_t>((py + s.padding - y) / s.stride), static_cast<int16_t>((px + s.padding - x) / s.stride), static_cast<int16_t>(y * s.kernel + x), static_cast<int16_t>(steps)};
    p.steps[phase] = (taps - p.first_tap[phase]) * steps;
  }
  p.first_tap[phases] = taps;
  return run(p, s, true, phases, c->dy, c->weight, c->dtype == 2, stream);
}
