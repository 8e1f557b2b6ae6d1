// Layer normalisation over the last dimension on CUDA devices, with an optional residual addition before it.
// dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take (more than 8192
// channels).
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// h = x + residual, y = (h - mean) rstd weight + bias.
int lcm_layer_norm_forward(const void *x,        // (rows, channels) dtype
                           const void *residual, // (rows, channels) dtype, or null: h = x
                           const void *weight,   // (channels,) dtype
                           const void *bias,     // (channels,) dtype
                           void *h,              // (rows, channels) dtype: the sum, as the dtype rounds it, which is what
                                                 // is normalised; null without residual; may be x or residual
                           void *y,              // (rows, channels) dtype
                           float *mean,          // (rows,) f32, written
                           float *rstd,          // (rows,) f32, written: 1 / sqrt(variance + eps)
                           int64_t rows, int channels, float eps, int dtype, cudaStream_t stream);

// Bytes of scratch memory for the backward pass; needed only where dweight or dbias is wanted.
size_t lcm_layer_norm_workspace(int64_t rows, int channels);

int lcm_layer_norm_backward(const void *h,       // (rows, channels) dtype: what was normalised
                            const void *weight,  // (channels,) dtype
                            const float *mean, const float *rstd, // (rows,) f32, of the forward pass
                            const void *dy,      // (rows, channels) dtype
                            const void *dh,      // (rows, channels) dtype: another gradient of h, added; or null
                            void *dx,            // (rows, channels) dtype: the gradient of x and of the residual alike;
                                                 // may be dh; null: not wanted
                            float *dweight,      // (channels,) f32, or null
                            float *dbias,        // (channels,) f32, or null
                            int64_t rows, int channels, int dtype,
                            void *workspace,     // lcm_layer_norm_workspace bytes, or null without dweight and dbias
                            cudaStream_t stream);
#ifdef __cplusplus
}
#endif
