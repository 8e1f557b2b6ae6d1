// Low-rank updates of frozen layers that share their input: y = x (weight + scale * up down)^T, layer below layer.
//
// dtype of weight, x and gradient: 0 = f32, 1 = bf16, 2 = f16; the gradients of the factors are f32, and so are the
// factors but where a function says otherwise. All functions return 0, a cudaError_t, or -1 where the shapes or the dtype
// are none they take.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

enum { LCM_LOW_RANK_LAYERS = 4 };

typedef struct {
  const void *down[LCM_LOW_RANK_LAYERS]; // (rank, input) each
  const void *up[LCM_LOW_RANK_LAYERS];   // (output, rank) each
  float *down_gradient[LCM_LOW_RANK_LAYERS], *up_gradient[LCM_LOW_RANK_LAYERS]; // like the factors; null: not wanted
  float scale[LCM_LOW_RANK_LAYERS];
  int32_t rank[LCM_LOW_RANK_LAYERS]; // 0: a layer without factors
  int32_t output[LCM_LOW_RANK_LAYERS];
  int32_t count, input, width, dtype; // layers; columns of down; width of the matrices below
  int32_t factor_dtype;               // f32, or the dtype of the weight
  int64_t tokens;                     // rows of x and gradient
  // For merging and the gradients.
  const void *weight;   // (sum of the outputs, input)
  void *merged;         // of the same shape
  void *narrow_factors; // the factors as the gradients' kernels read them; null: not wanted
  const void *x;        // (tokens, input)
  const void *gradient; // of y, (tokens, sum of the outputs)
  void *workspace;
  // For packing and unpacking.
  void *down_all; // (width, input): the downs one below the other, then zeros
  void *up_all;   // (sum of the outputs, width): scale * up of a layer in its rows and its columns, elsewhere zeros
} LcmLowRank;

#ifdef __cplusplus
extern "C" {
#endif
// Numbers, of the dtype, in narrow_factors; 0 where lcm_low_rank_gradients does not take the shapes or the dtype.
size_t lcm_low_rank_narrow_factors(const LcmLowRank *);
// Writes merged = weight + scale * up down, and narrow_factors. Takes factors of the weight's dtype too, where
// narrow_factors is null.
int lcm_low_rank_merge(const LcmLowRank *, cudaStream_t);

// Bytes of the workspace of:
size_t lcm_low_rank_workspace(const LcmLowRank *);
// From x, gradient and narrow_factors, writes down_gradient and up_gradient.
int lcm_low_rank_gradients(const LcmLowRank *, cudaStream_t);

// Writes down_all and up_all: products with these do all layers at once.
int lcm_low_rank_pack(const LcmLowRank *, cudaStream_t);
// Reads down_all and up_all as gradients, and writes down_gradient and up_gradient.
int lcm_low_rank_unpack(const LcmLowRank *, cudaStream_t);
#ifdef __cplusplus
}
#endif
