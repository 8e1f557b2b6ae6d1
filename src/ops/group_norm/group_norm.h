// Group normalisation with a fused activation on CUDA devices, channels last; the input may be the concatenation of two
// tensors on the channel axis, which is read in place.
// dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take: more than 3072
// channels in all, groups that do not divide them, a batch above 65535.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// Bytes of scratch memory (16-byte aligned) for the forward or the backward pass of these sizes; channels: of both
// inputs together.
size_t lcm_group_norm_workspace(int64_t batch, int64_t pixels, int channels, int groups);

// y = act((x - mean) rstd weight + bias), channels in all = channels1 + channels2.
int lcm_group_norm_forward(const void *x1,     // (batch, pixels, channels1) dtype
                           const void *x2,     // (batch, pixels, channels2) dtype: the channels after those of x1; or null
                           const void *weight, // (channels,) dtype
                           const void *bias,   // (channels,) dtype
                           void *y,            // (batch, pixels, channels) dtype
                           float *mean,        // (batch, groups) f32, written
                           float *rstd,        // (batch, groups) f32, written: 1 / sqrt(variance + eps)
                           int64_t batch, int64_t pixels,
                           int channels1, int channels2, // channels2: 0 without x2
                           int groups, float eps,
                           int activation,     // 0 none, 1 SiLU, 2 GELU (erf), 3 quick GELU, 4 ReLU
                           int dtype,
                           void *workspace,    // lcm_group_norm_workspace bytes
                           cudaStream_t stream);

int lcm_group_norm_backward(const void *x1, const void *x2, // as in the forward pass
                            const void *weight, const void *bias,
                            const float *mean, const float *rstd, // of the forward pass
                            const void *dy,     // (batch, pixels, channels) dtype
                            const void *so_far, // (batch, pixels, channels) dtype: added to dx1; or null. Not with x2.
                            void *dx1,          // (batch, pixels, channels1) dtype; null: gradients of x are not wanted
                            void *dx2,          // (batch, pixels, channels2) dtype; null without x2
                            float *dweight,     // (channels,) f32, or null
                            float *dbias,       // (channels,) f32, or null
                            int64_t batch, int64_t pixels, int channels1, int channels2, int groups, int activation,
                            int dtype, void *workspace, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
