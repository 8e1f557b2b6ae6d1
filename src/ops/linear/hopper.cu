// Linear layers on Hopper: the matrix product of ../hopper_gemm.h over an "image" of one row whose pixels are the rows of x. A low-rank update
// (LoRA) is a second tap: its product lengthens the sum over K, so it costs no pass over y. bf16 and f16, features in multiples of 8.
// Measured on an H100 this is worth its while with an update; a plain product of few steps is faster through cuBLASLt, which hides the writing of a tile better.
#include "../hopper_gemm.h"

using namespace hopper_gemm;

namespace {

// The map of a matrix (rows, features) whose rows are `row` numbers apart.
bool encode_rows(CUtensorMap *map, bool half, const int (&box)[4], const void *base, int64_t rows, int64_t features, int64_t row) {
  const int64_t sizes[4] = {features, rows, 1, 1}, strides[3] = {row, row * rows, row * rows};
  return encode(map, half, 4, base, sizes, strides, box);
}

// y (rows, columns) = a (rows, depth) b + low (rows, rank) c + bias + residual; b and c as (columns, K), or (K, columns) if `transposed`.
int run(const void *a, const void *b, const void *low, const void *c, int rank, const void *bias, const void *residual, void *y, int rows, int depth, int columns,
        int64_t a_row, int64_t y_row, int dtype, bool transposed, cudaStream_t stream) {
  const int multiprocessors = hopper_multiprocessors();
  if (!low) rank = 0;
  if (!multiprocessors || (dtype != 1 && dtype != 2) || rows < 1 || depth < 8 || columns < 8 || (depth | columns | rank | a_row | y_row) % 8) return -1;
  if (!aligned(a) || !aligned(b) || !aligned(low) || !aligned(c) || !aligned(residual) || !aligned(y)) return -1;
  const bool half = dtype == 2;
  Problem p = {};
  p.y = y, p.bias = bias, p.residual = residual;
  p.columns = columns, p.samples = 1, p.height = 1, p.width = rows, p.stride = 1;
  p.y_row = y_row, p.residual_row = columns;
  const int steps = (depth + kDepth - 1) / kDepth, low_steps = (rank + kDepth - 1) / kDepth;
  p.taps[0].steps = steps;
  p.taps[1] = Tap{1, 1, 0, 0, 0, static_cast<int16_t>(low_steps)};
  p.first_tap[1] = rank ? 2 : 1, p.steps[0] = steps + low_steps;
  int box[4];
  const Plan plan = cut(p, 1, transposed, multiprocessors, box);
  const auto weights = [&](CUtensorMap *map, const void *matrix, int k) {
    return transposed ? encode_weights(map, p, plan, half, true, matrix, columns, 1, k) : encode_weights(map, p, plan, half, false, matrix, k, 1, columns);
  };
  if (!encode_rows(&p.a[0], half, box, a, rows, depth, a_row) || !weights(&p.b[0], b, depth)) return -1;
  if (rank && (!encode_rows(&p.a[1], half, box, low, rows, rank, rank) || !weights(&p.b[1], c, rank))) return -1;
  return launch(p, plan, transposed, half, multiprocessors, stream);
}

} // namespace

// y (rows, out) = x (rows, in) weight^T (out, in) + low (rows, rank) up^T (out, rank) + bias (out) + residual (rows, out). Rows of x and y are x_row and
// y_row numbers apart, the others are contiguous; low and up, bias, residual may be null.
extern "C" int lcm_linear_forward_hopper(const void *x, const void *weight, const void *low, const void *up, int rank, const void *bias, const void *residual, void *y,
                                         int rows, int in, int out, int64_t x_row, int64_t y_row, int dtype, cudaStream_t stream) {
  return run(x, weight, low, up, rank, bias, residual, y, rows, in, out, x_row, y_row, dtype, false, stream);
}

// dx (rows, in) = dy (rows, out) weight (out, in) + dlow (rows, rank) down (rank, in) + residual (rows, in). Rows of dy and dx are dy_row and dx_row numbers apart.
extern "C" int lcm_linear_input_gradient_hopper(const void *dy, const void *weight, const void *dlow, const void *down, int rank, const void *residual, void *dx,
                                                int rows, int in, int out, int64_t dy_row, int64_t dx_row, int dtype, cudaStream_t stream) {
  return run(dy, weight, dlow, down, rank, nullptr, residual, dx, rows, out, in, dy_row, dx_row, dtype, true, stream);
}
