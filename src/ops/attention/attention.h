#pragma once
#include <stddef.h>
#include <stdint.h>
// One call of attention: softmax([q k^T, q k2^T] * scale) [v; v2], per head. Rows are tokens; a row holds heads * head_dim numbers. Strides count elements.
typedef struct {
  const void *q, *k, *v;        // (batch, tokens, ..), (batch, own_tokens, ..)
  const void *k2, *v2;          // (reference_batch, reference_tokens, ..); null without a reference
  void *out;                    // (batch, tokens, heads * head_dim)
  float *lse;                   // (batch, heads, tokens): natural log of the sum of exp(scaled scores); null where not wanted
  const uint8_t *use_reference; // per sample of the batch: 0 = this sample does not see the reference; null = all do
  int32_t batch, heads, head_dim, tokens, own_tokens, reference_tokens, reference_batch; // reference_batch: batch or 1
  int32_t dtype, causal;
  int64_t q_row, k_row, v_row, k2_row, v2_row, out_row;             // stride between tokens
  int64_t q_batch, k_batch, v_batch, k2_batch, v2_batch, out_batch; // stride between samples
  float scale;                  // head_dim^-0.5 as a rule
} LcmAttention;
// The gradients of such a call. forward.out and forward.lse are those of the forward pass. Null pointers: not wanted (dk and dv, dk2 and dv2 go in pairs). Gradients are written, not added to.
// A reference shared by the batch (reference_batch = 1) gets the sum over the batch.
typedef struct {
  LcmAttention forward;
  const void *dout;             // strides out_row, out_batch
  void *dq, *dk, *dv, *dk2, *dv2; // laid out with the strides below
  int64_t dq_row, dk_row, dv_row, dk2_row, dv2_row;
  int64_t dq_batch, dk_batch, dv_batch, dk2_batch, dv2_batch;
  void *workspace; size_t workspace_bytes;
  int32_t deterministic;
} LcmAttentionGradient;
