// What attention over heads too wide for one kernel needs beside matrix products: the softmax of a block of scores, and
// its gradient. dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// weights = softmax(scores) row by row; lse = natural log of the sum of exp(score). With causal, row i sees the keys up to
// first_query + i.
int lcm_attention_softmax(const float *scores, // (rows, keys) f32, scaled
                          void *weights,       // (rows, keys) dtype
                          float *lse,          // (rows,) f32
                          int64_t rows, int64_t keys, int64_t first_query, int causal, int dtype, cudaStream_t stream);

// weights as above, from the lse kept; slopes = scale weights (dweights - sum over the row of weights dweights).
int lcm_attention_softmax_gradient(const float *scores,   // (rows, keys) f32, scaled
                                   const float *lse,      // (rows,) f32
                                   const float *dweights, // (rows, keys) f32: dout v^T
                                   void *weights,         // (rows, keys) dtype, written
                                   void *slopes,          // (rows, keys) dtype, written
                                   int64_t rows, int64_t keys, int64_t first_query, int causal, float scale, int dtype,
                                   cudaStream_t stream);
#ifdef __cplusplus
}
#endif
