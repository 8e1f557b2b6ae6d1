// Bilinear and bicubic resizing on CUDA devices (torch: interpolate, align_corners=False). filter: 0 = linear, 1 = a triangle,
// 2 = Keys' cubic with a = -0.5; the last two are stretched by the factor of a reduction. dtype: 0 = f32, 1 = bf16,
// 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// Bytes of scratch memory (4-byte aligned) for the forward or the backward pass: the filter's weights.
size_t lcm_resize_bilinear_workspace(int height, int width, int new_height, int new_width, int filter);

int lcm_resize_bilinear_forward(const void *x, // (batch, height, width, channels) dtype
                                void *y,       // (batch, new_height, new_width, channels) dtype
                                int64_t batch, int height, int width, int channels, int new_height, int new_width,
                                int filter, int dtype, void *workspace, cudaStream_t stream);

int lcm_resize_bilinear_backward(const void *dy, // (batch, new_height, new_width, channels) dtype
                                 void *dx,       // (batch, height, width, channels) dtype
                                 int64_t batch, int height, int width, int channels, int new_height, int new_width,
                                 int filter, int dtype, void *workspace, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
