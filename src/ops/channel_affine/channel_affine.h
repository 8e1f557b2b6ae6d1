// A factor and a term for every channel on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y = x scale + shift.
int lcm_channel_affine_forward(const void *x,     // (rows, channels) dtype
                               const void *scale, // (channels,) dtype
                               const void *shift, // (channels,) dtype
                               void *y,           // (rows, channels) dtype
                               int64_t rows, int channels, int dtype, cudaStream_t stream);

// dx = dy scale.
int lcm_channel_affine_input_gradient(const void *dy,    // (rows, channels) dtype
                                      const void *scale, // (channels,) dtype
                                      void *dx,          // (rows, channels) dtype
                                      int64_t rows, int channels, int dtype, cudaStream_t stream);

// Bytes of scratch memory for lcm_channel_affine_parameter_gradients.
size_t lcm_channel_affine_workspace(int64_t rows, int channels);

// dscale = sum over the rows of x dy; dshift = sum over the rows of dy. Equal bit for bit between runs.
int lcm_channel_affine_parameter_gradients(const void *x,   // (rows, channels) dtype: what the forward pass took
                                           const void *dy,  // (rows, channels) dtype
                                           float *dscale,   // (channels,) f32
                                           float *dshift,   // (channels,) f32
                                           int64_t rows, int channels, int dtype,
                                           void *workspace, // lcm_channel_affine_workspace bytes
                                           cudaStream_t stream);
#ifdef __cplusplus
}
#endif
