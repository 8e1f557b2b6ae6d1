// Patches of pictures as rows of a matrix, and back, on CUDA devices: with a matrix product, a convolution of any
// shape.
// dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// patches[b, oy, ox, ky, kx, c] = x[b, oy stride + ky - padding, ox stride + kx - padding, c], 0 outside. With
// out_size = (size + padding + padding_end - kernel) / stride + 1. Rows times a weight (out, kernel, kernel, channels)
// flattened. Patches of `pixels` output pixels from `first` on, counted through the batch.
int lcm_im2col_forward(const void *x,  // (batch, height, width, channels) dtype
                       void *patches,  // (pixels, kernel_height, kernel_width, channels) dtype
                       int64_t batch, int height, int width, int channels, int kernel_height, int kernel_width,
                       int stride, int padding, int padding_end, int64_t first, int64_t pixels, int dtype,
                       cudaStream_t stream);

// Its gradient: every pixel gets the sum of its places in patches.
int lcm_im2col_backward(const void *dpatches, // (batch, out_height, out_width, kernel_height, kernel_width, channels) dtype
                        void *dx,             // (batch, height, width, channels) dtype
                        int64_t batch, int height, int width, int channels, int kernel_height, int kernel_width,
                        int stride, int padding, int padding_end, int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
