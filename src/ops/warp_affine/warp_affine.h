// Affine warping on CUDA devices: bilinear, zeros outside. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y[b, row, column] = x[b] sampled at (matrix[0] column + matrix[1] row + matrix[2], matrix[3] column + matrix[4] row +
// matrix[5]), each (x, y).
int lcm_warp_affine_forward(const void *x,          // (batch, height, width, channels) dtype
                            const double *matrices, // (batch, 2, 3) f64, in device memory
                            void *y,                // (batch, new_height, new_width, channels) dtype
                            int64_t batch, int height, int width, int channels, int new_height, int new_width,
                            int dtype, cudaStream_t stream);

int lcm_warp_affine_backward(const void *dy,        // (batch, new_height, new_width, channels) dtype
                             const double *matrices, // as in the forward pass
                             void *dx,              // (batch, height, width, channels) dtype
                             int64_t batch, int height, int width, int channels, int new_height, int new_width,
                             int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
