#pragma once
// The matrix product behind the convolutions and linear layers on Hopper: y (pixels, columns) = sum over taps and channels.
//
// A is gathered by the copy engine: 128 (or 64) output pixels form a box of the image (samples x rows x columns), and under
// a tap of the kernel they read the same box of the input, shifted; what lies outside of the image arrives as zeros, which is
// the padding. So the main loop is that of a plain product over (tap, 64 channels) steps. A linear layer is the case of one
// tap and an image of one row.
//
// One block computes 2 boxes with two consumer warpgroups (one per box) and a producer warp. Tiles are 256 x 160 or 128 x 320 where there are many:
// SDXL's channel counts are multiples of 320, and such tiles cover its images in multiples of 128, which suits 132 multiprocessors. Autoencoders
// have 64 or 128 channels where their images are largest, and get tiles of as many columns.
// The blocks of a cluster share loads (`cn` blocks side by side read the same pixels, `cm` blocks the same weights, by multicast) or
// split the sum over K (`split`; the parts meet in shared memory, added in a fixed order).
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace hopper_gemm {

constexpr int kDepth = 64; // channels of a step: 128 bytes, the width of the swizzle
constexpr int kMaxTaps = 25;

// A summand of every output: input shifted by (dy, dx), times the weights of `tap`, over `steps` * 64 channels.
struct Tap {
  int16_t a, b;   // tensor maps
  int16_t dy, dx; // shift of the box in A's image
  int16_t tap;    // second coordinate in B
  int16_t steps;
};

struct Problem {
  CUtensorMap a[4]; // (channels, width, height, samples); several where A is strided, one per parity of its pixels
  CUtensorMap b[2]; // (input channels, taps, output channels)
  Tap taps[kMaxTaps];
  int16_t first_tap[5], steps[4];     // per phase: its taps are first_tap[p] .. first_tap[p + 1]
  int16_t phase_y[4], phase_x[4];     // phase p makes the output pixels (phase_y + i * stride, phase_x + j * stride)
  int32_t stride;
  void *y;
  const void *bias, *sample_bias, *residual;
  int32_t gate; // the residual is not added: where it is not positive, y is 0 (the gradient of a rectifier, given its result)
  float floor;  // the least that y may be, not above 0: 0 for a rectifier, else minus infinity
  int64_t y_row, residual_row; // numbers from pixel to pixel
  int32_t columns, samples, height, width; // of y
  int32_t log_w, log_h;                    // a box has 2^log_w columns, 2^log_h rows, and samples to fill it
  int32_t boxes_x, boxes_y;
  int32_t tiles_m, tiles_n, tiles; // in clusters; tiles counts those of all phases
  int32_t cm, cn, split;
  int32_t whole_blocks; // of a transposed B: one box per step brings all columns (their number is a multiple of 64)
};

// How a problem is cut: pixels and columns per tile, and the shape of the cluster (as in Problem).
struct Plan {
  int rows, columns, cm, cn, split;
};

// Cuts the output of `phases` phases into boxes, tiles and clusters; `box` becomes that of A's tensor maps (samples, rows, columns, channels
// from the last on). `transposed`: B is read as (K, columns). Of the problem, taps, steps and the shape of y are given, the rest of the geometry is filled in.
Plan cut(Problem &problem, int phases, bool transposed, int multiprocessors, int (&box)[4]);

// A tensor map over 16-bit numbers: sizes and box from the innermost dimension on, strides in numbers for all but the innermost.
bool encode(CUtensorMap *map, bool half, int rank, const void *base, const int64_t *sizes, const int64_t *strides, const int *box);

// The tensor map of weights (output channels, taps, input channels); `transposed`: they are read for the gradient of the input.
bool encode_weights(CUtensorMap *map, const Problem &problem, const Plan &plan, bool half, bool transposed, const void *weight, int64_t input, int64_t taps, int64_t output);

// Starts the kernel. Returns a cudaError_t.
int launch(const Problem &problem, const Plan &plan, bool transposed, bool half, int multiprocessors, cudaStream_t stream);

// Multiprocessors of the current device if it is a Hopper, else 0.
int hopper_multiprocessors();

inline bool aligned(const void *pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }

} // namespace hopper_gemm
