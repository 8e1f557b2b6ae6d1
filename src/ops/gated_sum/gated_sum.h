// Channels weighed sample by sample, and the mean that the weights come from, on CUDA devices. dtype: 0 = f32, 1 = bf16,
// 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y = x logistic(logits) + addend.
int lcm_gated_sum_forward(const void *x,      // (batch, pixels, channels) dtype
                          const void *logits, // (batch, channels) dtype
                          const void *addend, // (batch, pixels, channels) dtype
                          void *y,            // (batch, pixels, channels) dtype
                          int64_t batch, int64_t pixels, int channels, int dtype, cudaStream_t stream);

// dx = dy logistic(logits).
int lcm_gated_sum_input_gradient(const void *dy,     // (batch, pixels, channels) dtype
                                 const void *logits, // (batch, channels) dtype
                                 void *dx,           // (batch, pixels, channels) dtype
                                 int64_t batch, int64_t pixels, int channels, int dtype, cudaStream_t stream);

// Bytes of scratch memory for the sums over pixels of lcm_gated_sum_logit_gradient and lcm_mean_pixels.
size_t lcm_gated_sum_workspace(int64_t batch, int64_t pixels, int channels);

// dlogits = logistic'(logits) times the sum over pixels of dy x, summed in f32. Equal bit for bit between runs.
int lcm_gated_sum_logit_gradient(const void *x,      // (batch, pixels, channels) dtype
                                 const void *dy,     // (batch, pixels, channels) dtype
                                 const void *logits, // (batch, channels) dtype
                                 float *sums,        // (batch, channels) f32: scratch memory
                                 void *dlogits,      // (batch, channels) dtype
                                 int64_t batch, int64_t pixels, int channels, int dtype,
                                 void *workspace,    // lcm_gated_sum_workspace bytes
                                 cudaStream_t stream);

// out = the mean over pixels, summed in f32. Equal bit for bit between runs.
int lcm_mean_pixels(const void *x, // (batch, pixels, channels) dtype
                    float *sums,   // (batch, channels) f32: scratch memory
                    void *out,     // (batch, channels) dtype
                    int64_t batch, int64_t pixels, int channels, int dtype,
                    void *workspace, // lcm_gated_sum_workspace bytes
                    cudaStream_t stream);

// out = v factor at every pixel.
int lcm_spread_over_pixels(const void *v, // (batch, channels) dtype
                           void *out,     // (batch, pixels, channels) dtype
                           float factor, int64_t batch, int64_t pixels, int channels, int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
