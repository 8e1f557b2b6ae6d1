// Where the narrow factors of each layer lie, in the order of the kernels that read them: first the downs of all layers,
// (ranks, input), one below the other, then the transposed up of each layer, (rank, output). All in the 16-bit dtype of
// the layers, each block filled up with rows of zeros to a multiple of 8, which is what a tensor core takes.
#pragma once
#include "low_rank.h"

namespace lcm {

constexpr int kNarrowRanks = 16; // the ranks of all layers together that the gradients' kernels take

__host__ __device__ inline int rows_of(int rank) { return (rank + 7) / 8 * 8; }

__host__ __device__ inline int ranks_before(const LcmLowRank &call, int layer) {
  int ranks = 0;
  for (int i = 0; i < layer; i++) ranks += call.rank[i];
  return ranks;
}

__host__ __device__ inline int outputs_before(const LcmLowRank &call, int layer) {
  int outputs = 0;
  for (int i = 0; i < layer; i++) outputs += call.output[i];
  return outputs;
}

// Where the up of a layer begins; of the number of layers: how many numbers there are.
__host__ __device__ inline int64_t narrow_up(const LcmLowRank &call, int layer) {
  int64_t start = int64_t(rows_of(ranks_before(call, call.count))) * call.input;
  for (int i = 0; i < layer; i++) start += int64_t(rows_of(call.rank[i])) * call.output[i];
  return start;
}

inline bool takes_narrow(const LcmLowRank &call) {
  const int ranks = ranks_before(call, call.count);
  bool fits = (call.dtype == 1 || call.dtype == 2) && ranks > 0 && ranks <= kNarrowRanks && call.input % 8 == 0;
  for (int i = 0; i < call.count; i++) fits = fits && call.output[i] % 8 == 0;
  return fits;
}

} // namespace lcm
