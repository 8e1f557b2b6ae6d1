// Doubling of height and width by repetition on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

int lcm_upsample_nearest_2x_forward(const void *x,  // (batch, height, width, channels) dtype
                                    void *y,        // (batch, 2 height, 2 width, channels) dtype
                                    int64_t batch, int height, int width, int channels, int dtype, cudaStream_t stream);

// Each pixel's gradient is the sum over its four copies.
int lcm_upsample_nearest_2x_backward(const void *dy, // (batch, 2 height, 2 width, channels) dtype
                                     void *dx,       // (batch, height, width, channels) dtype
                                     int64_t batch, int height, int width, int channels, int dtype,
                                     cudaStream_t stream);
#ifdef __cplusplus
}
#endif
