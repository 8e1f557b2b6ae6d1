// The rectifier with a learnt slope for every channel on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y = x where x is positive, else slope x.
int lcm_prelu_forward(const void *x,     // (rows, channels) dtype
                      const void *slope, // (channels,) dtype
                      void *y,           // (rows, channels) dtype
                      int64_t rows, int channels, int dtype, cudaStream_t stream);

// dx = dy where x is positive, else slope dy.
int lcm_prelu_input_gradient(const void *x,     // (rows, channels) dtype: what the forward pass took
                             const void *slope, // (channels,) dtype
                             const void *dy,    // (rows, channels) dtype
                             void *dx,          // (rows, channels) dtype
                             int64_t rows, int channels, int dtype, cudaStream_t stream);

// Bytes of scratch memory for lcm_prelu_slope_gradient.
size_t lcm_prelu_workspace(int64_t rows, int channels);

// dslope = sum of x dy over the rows where x is not positive. Equal bit for bit between runs.
int lcm_prelu_slope_gradient(const void *x,   // (rows, channels) dtype
                             const void *dy,  // (rows, channels) dtype
                             float *dslope,   // (channels,) f32
                             int64_t rows, int channels, int dtype,
                             void *workspace, // lcm_prelu_workspace bytes
                             cudaStream_t stream);
#ifdef __cplusplus
}
#endif
