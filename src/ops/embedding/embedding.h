// Lookup of rows of a table on CUDA devices. dtype: 0 = f32, 1 = bf16, 2 = f16.
// All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y[i] = table[ids[i]]; zeros for an id that is not below `entries`.
int lcm_embedding_forward(const void *table,    // (entries, channels) dtype
                          const uint32_t *ids,  // (tokens,) u32
                          void *y,              // (tokens, channels) dtype
                          int64_t tokens, int64_t entries, int channels, int dtype, cudaStream_t stream);

// dtable[e] = sum of dy over the tokens of id e, in their order; zeros for the other entries.
int lcm_embedding_backward(const uint32_t *ids, // (tokens,) u32
                           const void *dy,      // (tokens, channels) dtype
                           float *dtable,       // (entries, channels) f32
                           int64_t tokens, int64_t entries, int channels, int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
