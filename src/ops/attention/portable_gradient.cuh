#pragma once
// What the portable kernels of the gradients share.
#include "portable.cuh"

namespace portable {

// A gradient call and the row dots the kernels' first pass leaves: (batch, heads, tokens).
struct Gradient {
  LcmAttentionGradient g;
  float *row_dots;
  bool own, reference; // which keys' gradients are wanted
  bool in_fours;       // f32 inputs that can be copied four at a time
};

// row_dots (batch, heads, tokens) = sum over head_dim of out * dout, which is the sum over the keys of weight * its gradient. A warp for each.
__global__ void __launch_bounds__(256) row_dots(const __grid_constant__ Gradient call) {
  const LcmAttention &a = call.g.forward;
  const int token = blockIdx.x * 8 + threadIdx.y, head = blockIdx.y, sample = blockIdx.z;
  if (token >= a.tokens) return;
  const int64_t at = sample * a.out_batch + token * a.out_row + static_cast<int64_t>(head) * a.head_dim;
  float sum = 0.f;
  for (int d = threadIdx.x; d < a.head_dim; d += 32) sum = fmaf(load(a.out, at + d, a.dtype), load(call.g.dout, at + d, a.dtype), sum);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x == 0) call.row_dots[(static_cast<int64_t>(sample) * a.heads + head) * a.tokens + token] = sum;
}

// The tile of keys whose gradients a block makes, and whose queries look at it: those of `samples` samples from `sample` on, because a reference the batch
// shares meets them all (only the blocks of the first sample then work: `samples` is 0 for the others).
struct KeyGradient {
  Keys keys;
  void *dk, *dv;
  int64_t dk_offset, dv_offset, dk_row, dv_row;
  int sample, samples;
};

__device__ inline KeyGradient key_gradient(const Gradient &call, int block, int tile, int sample, int head) {
  const LcmAttentionGradient &g = call.g;
  const LcmAttention &a = g.forward;
  const int own_tiles = tiles_of(a.own_tokens, tile), index = call.own ? block : block + own_tiles;
  const int64_t column = static_cast<int64_t>(head) * a.head_dim;
  const Keys keys = keys_of_tile(a, index, tile, sample, head);
  if (keys.own) return {keys, g.dk, g.dv, sample * g.dk_batch + column, sample * g.dv_batch + column, g.dk_row, g.dv_row, sample, 1};
  const bool shared = a.reference_batch == 1;
  return {keys, g.dk2, g.dv2, sample * g.dk2_batch + column, sample * g.dv2_batch + column, g.dk2_row, g.dv2_row, sample,
          !shared ? 1 : sample == 0 ? a.batch : 0};
}

// Blocks along x of a kernel whose blocks make the gradients of a tile of keys each.
inline int key_blocks(const Gradient &call, int tile) {
  const LcmAttention &a = call.g.forward;
  return (call.own ? tiles_of(a.own_tokens, tile) : 0) + (call.reference ? tiles_of(a.reference_tokens, tile) : 0);
}

} // namespace portable
