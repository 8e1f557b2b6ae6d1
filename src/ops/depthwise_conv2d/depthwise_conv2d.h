// Depthwise convolution, channels last, on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// The sizes of a convolution; out = (in + 2 padding - kernel) / stride + 1, rounded down.
typedef struct {
  int32_t batch, height, width, channels, kernel_height, kernel_width, stride, padding, dtype;
} LcmDepthwiseConv2d;

int lcm_depthwise_conv2d_forward(const void *x,      // (batch, height, width, channels) dtype
                                 const void *weight, // (kernel_height, kernel_width, channels) dtype
                                 const void *bias,   // (channels,) dtype, or null
                                 void *y,            // (batch, out_height, out_width, channels) dtype
                                 const LcmDepthwiseConv2d *sizes, cudaStream_t stream);

int lcm_depthwise_conv2d_input_gradient(const void *dy,     // (batch, out_height, out_width, channels) dtype
                                        const void *weight, // as above
                                        void *dx,           // (batch, height, width, channels) dtype
                                        const LcmDepthwiseConv2d *sizes, cudaStream_t stream);

// Bytes of scratch memory for lcm_depthwise_conv2d_weight_gradient.
size_t lcm_depthwise_conv2d_workspace(const LcmDepthwiseConv2d *sizes);

// Equal bit for bit between runs.
int lcm_depthwise_conv2d_weight_gradient(const void *x,   // (batch, height, width, channels) dtype
                                         const void *dy,  // (batch, out_height, out_width, channels) dtype
                                         float *dweight,  // (kernel_height, kernel_width, channels) f32
                                         const LcmDepthwiseConv2d *sizes,
                                         void *workspace, // lcm_depthwise_conv2d_workspace bytes
                                         cudaStream_t stream);
#ifdef __cplusplus
}
#endif
