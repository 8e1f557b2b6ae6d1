// The gated GELU on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y = a gelu(b), where a and b are the halves of a row of x.
int lcm_geglu_forward(const void *x,    // (rows, 2 channels) dtype
                      void *y,          // (rows, channels) dtype
                      int64_t rows, int channels, int dtype, cudaStream_t stream);

int lcm_geglu_backward(const void *x,   // (rows, 2 channels) dtype: what the forward pass took
                       const void *dy,  // (rows, channels) dtype
                       void *dx,        // (rows, 2 channels) dtype; may be x
                       int64_t rows, int channels, int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
