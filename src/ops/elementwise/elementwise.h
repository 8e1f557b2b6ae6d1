// Sums, scalings, copies and casts on CUDA devices, and the sums that are gradients of broadcasts.
// dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// out = a + b. For a += b, out is a.
int lcm_elementwise_add(const void *a, const void *b, // (count,) dtype
                        void *out,                    // (count,) dtype; may be a or b
                        int64_t count, int dtype, cudaStream_t stream);

// out = alpha a + beta b. With b null: out = alpha a.
int lcm_elementwise_combine(const void *a, const void *b, // (count,) dtype; b may be null
                            void *out,                    // (count,) dtype; may be a or b
                            float alpha, float beta, int64_t count, int dtype, cudaStream_t stream);

// out = x + v, v broadcast over the pixels of a sample. A bias: batch 1, all rows as pixels.
int lcm_elementwise_add_channels(const void *x, // (batch, pixels, channels) dtype
                                 const void *v, // (batch, channels) dtype
                                 void *out,     // (batch, pixels, channels) dtype; may be x
                                 int64_t batch, int64_t pixels, int channels, int dtype, cudaStream_t stream);

// Bytes of scratch memory for lcm_elementwise_sum_pixels.
size_t lcm_elementwise_sum_pixels_workspace(int64_t batch, int64_t pixels, int channels);

// out[b, c] = sum over pixels of x: the gradient of v above. A sum over rows: batch 1. Equal bit for bit between runs.
int lcm_elementwise_sum_pixels(const void *x, // (batch, pixels, channels) dtype
                               float *out,    // (batch, channels) f32
                               int64_t batch, int64_t pixels, int channels, int dtype,
                               void *workspace, // lcm_elementwise_sum_pixels_workspace bytes
                               cudaStream_t stream);

// to = from, as another dtype.
int lcm_elementwise_cast(const void *from, // (count,) from_dtype
                         void *to,         // (count,) to_dtype
                         int64_t count, int from_dtype, int to_dtype, cudaStream_t stream);

// Rows of `channels` elements, from and to places with other distances between rows.
int lcm_elementwise_copy_rows(const void *from, // rows from_stride elements apart
                              void *to,         // rows to_stride elements apart
                              int64_t rows, int64_t channels, int64_t from_stride, int64_t to_stride,
                              int element_bytes, // 1, 2, 4 or 8
                              cudaStream_t stream);

// out = [a, b] on the last axis.
int lcm_elementwise_concat(const void *a, // (rows, channels_a)
                           const void *b, // (rows, channels_b)
                           void *out,     // (rows, channels_a + channels_b)
                           int64_t rows, int64_t channels_a, int64_t channels_b, int element_bytes, cudaStream_t stream);

// The inverse, and so the gradient, of concat. Null: that part is not wanted.
int lcm_elementwise_split(const void *x, // (rows, channels_a + channels_b)
                          void *a,       // (rows, channels_a), or null
                          void *b,       // (rows, channels_b), or null
                          int64_t rows, int64_t channels_a, int64_t channels_b, int element_bytes, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
