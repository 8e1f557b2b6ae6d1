#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

// y = (x V^T + v) * gelu(x G^T + g): a linear layer and the gated GELU (by erf) of its output.
typedef struct {
  const void *x;      // (rows, inner)
  const void *weight; // (2 * columns, inner): V, then G
  const void *bias;   // (2 * columns): v, then g; or null
  void *y;            // (rows, columns)
  int32_t rows, inner, columns, dtype;
} LcmLinearGeglu;

// On Hopper, in bf16 and f16, with inner and columns multiples of 8 and memory aligned to 16 bytes; else -1.
extern "C" int lcm_linear_geglu_hopper(const LcmLinearGeglu *arguments, cudaStream_t stream);
