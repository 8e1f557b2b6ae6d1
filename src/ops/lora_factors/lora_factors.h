// The low-rank factors of several layers with one input, as two matrices: products with them do all layers at once.
// dtype of the matrices: 0 = f32, 1 = bf16, 2 = f16; the factors are f32. Both return 0, a cudaError_t, or -1.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

enum { LCM_LORA_LAYERS = 4 };

typedef struct {
  const float *down[LCM_LORA_LAYERS]; // (rank, input) each; null: the layer has no factors
  const float *up[LCM_LORA_LAYERS];   // (output, rank) each
  float *down_gradient[LCM_LORA_LAYERS], *up_gradient[LCM_LORA_LAYERS]; // of the same shapes; null: not wanted
  float scale[LCM_LORA_LAYERS];
  int32_t rank[LCM_LORA_LAYERS], output[LCM_LORA_LAYERS];
  int32_t count, input, width, dtype; // layers; columns of down; columns of up_all, at least the sum of the ranks
  void *down_all; // (width, input): the downs one below the other, then zeros
  void *up_all;   // (sum of the outputs, width): scale * up of a layer in its rows and its columns, elsewhere zeros
} LcmLoraFactors;

#ifdef __cplusplus
extern "C" {
#endif
// Writes down_all and up_all.
int lcm_lora_factors_forward(const LcmLoraFactors *, cudaStream_t);
// Reads down_all and up_all as gradients, and writes down_gradient and up_gradient.
int lcm_lora_factors_backward(const LcmLoraFactors *, cudaStream_t);
#ifdef __cplusplus
}
#endif
