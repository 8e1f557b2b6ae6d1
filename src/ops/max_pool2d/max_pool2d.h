// Maximum pooling without padding, channels last, on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// out = (in - kernel) / stride + 1, rounded down.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

int lcm_max_pool2d_forward(const void *x, // (batch, height, width, channels) dtype
                           void *y,       // (batch, out_height, out_width, channels) dtype
                           int64_t batch, int height, int width, int channels, int kernel, int stride, int dtype,
                           cudaStream_t stream);

// The gradient of a window goes to the first of its largest values. Equal bit for bit between runs.
int lcm_max_pool2d_backward(const void *x,  // (batch, height, width, channels) dtype: what the forward pass took
                            const void *dy, // (batch, out_height, out_width, channels) dtype
                            void *dx,       // (batch, height, width, channels) dtype
                            int64_t batch, int height, int width, int channels, int kernel, int stride, int dtype,
                            cudaStream_t stream);
#ifdef __cplusplus
}
#endif
