#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

// y = x W^T + b + residual; or, gated, y = (x V^T + v) * gelu(x G^T + g), by erf, where V and G are the first and the second half of W's
// rows, v and g those of b.
typedef struct {
  const void *x;      // (rows, inner)
  const void *weight; // (columns, inner); gated: (2 * columns, inner)
  const void *bias;   // (columns) or (2 * columns), or null
  const void *residual; // (rows, columns), or null; may be y. Not gated. Added to the rounded product
  void *y;            // (rows, columns)
  int32_t rows, inner, columns, dtype, gated;
} LcmLinear;

// On Hopper, in bf16 and f16, with inner and columns multiples of 8 and memory aligned to 16 bytes; else -1.
extern "C" int lcm_linear_hopper(const LcmLinear *arguments, cudaStream_t stream);
