// Rows of every sample of a batch, by their indices. Returns 0, a cudaError_t, or -1 for what it does not take.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// from: (batch, tokens_from, channels); to: (batch, tokens_to, channels); indices: (tokens_to), each below tokens_from or
// 0xffffffff, which stands for a row of zeros. dtype: 0 = f32, 1 = bf16, 2 = f16.
int lcm_select_tokens(const void *from, void *to, const uint32_t *indices, int64_t batch, int tokens_from,
                      int tokens_to, int channels, int dtype, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
