// AdamW over many tensors in three launches on CUDA devices, without a word to the host: the gradients' norm, its
// clipping
// factor, and one pass that updates moments, parameters, their moving averages and their bf16 copies.
// All return 0 or a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// Elements of a chunk, what one block treats. A tensor of n elements has (n + LCM_ADAMW_CHUNK - 1) / LCM_ADAMW_CHUNK.
#define LCM_ADAMW_CHUNK 8192

// One parameter and the numbers of its update; those of its step are computed by the caller in f64.
typedef struct {
  float *parameter;           // (length,)
  float *first_moment;        // (length,)
  float *second_moment;       // (length,)
  const void *gradient;       // (length,) gradient_dtype; null: no update of the parameter, only of its average
  float *average;             // (length,) moving average, or null
  void *shadow;               // (length,) bf16 copy of the parameter, or null
  int64_t length;
  int64_t first_chunk;        // sum of the chunks of the tensors before this one
  int32_t gradient_dtype;     // 0 = f32, 1 = bf16, 2 = f16
  float keep;                 // 1 - learning_rate weight_decay
  float step_size;            // learning_rate / (1 - beta1^step)
  float root_correction;      // sqrt(1 - beta2^step)
  float rest1;                // 1 - beta1
  float beta2;
  float rest2;                // 1 - beta2
  float epsilon;
  float average_rest;         // 1 - decay of the moving average
  int32_t unused;             // makes the size a multiple of 8; 0
} LcmAdamWTensor;

// What a step reports, in device memory.
typedef struct {
  double norm;      // of all gradients together, times gradient_scale, before clipping
  float factor;     // what the gradients were multiplied by: gradient_scale, and max_norm / (norm + 1e-6) if below 1
  int32_t skipped;  // 1: the norm was not finite, and nothing was changed
} LcmAdamWReport;

// Bytes of scratch memory for a list of this many chunks in all.
size_t lcm_adamw_workspace(int64_t chunks);

// Equal bit for bit between runs.
int lcm_adamw_step(const LcmAdamWTensor *tensors, // (count,) in device memory
                   int32_t count,
                   int64_t chunks,                // of all tensors together
                   float gradient_scale,          // gradients are multiplied by it first: 1, or 1 / accumulated batches
                   double max_norm,               // 0: no clipping
                   LcmAdamWReport *report,        // one, in device memory, written
                   void *workspace,               // lcm_adamw_workspace bytes
                   cudaStream_t stream);
#ifdef __cplusplus
}
#endif
