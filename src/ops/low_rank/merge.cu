// The weight of layers with their low-rank updates added to it, and the factors in the layers' own dtype. Trainable
// factors are f32, frozen ones may come in the layers' dtype.
//
// Bound by memory: the weight is read and written once. A thread makes V adjacent columns of kRows rows, so that it
// reads each of its numbers of `down` once for all of those rows; `up` comes from the first-level cache, as the threads
// of a warp want the same numbers of it. Sums in f32 on top of the weight, in the order of the ranks, rounded once.
#include "../elements.cuh"
#include "narrow.h"
#include <type_traits>

namespace {

constexpr int kRows = 8;
constexpr int kThreads = 256;

__host__ __device__ int row_tiles(const LcmLowRank &call, int layer) { return (call.output[layer] + kRows - 1) / kRows; }

// Blocks beyond the first `merging` copy the factors.
template <class T, int V>
__device__ void copy_factors(const LcmLowRank &call, int64_t element) {
  if constexpr (V == 8) {
    const int64_t ups = lcm::narrow_up(call, 0);
    if (element >= lcm::narrow_up(call, call.count)) return;
    float values[V] = {};
    if (element < ups) {
      int row = int(element / call.input);
      for (int layer = 0; layer < call.count; layer++) {
        if (row < call.rank[layer]) {
          const float *from = static_cast<const float *>(call.down[layer]) + int64_t(row) * call.input + element % call.input;
#pragma unroll
          for (int i = 0; i < V; i++) values[i] = from[i];
          break;
        }
        row -= call.rank[layer];
      }
    } else {
      int layer = 0;
      while (layer + 1 < call.count && element >= lcm::narrow_up(call, layer + 1)) layer++;
      const int64_t place = element - lcm::narrow_up(call, layer);
      const int rank = call.rank[layer], row = int(place / call.output[layer]), column = int(place % call.output[layer]);
      if (row < rank) {
#pragma unroll
        for (int i = 0; i < V; i++) values[i] = static_cast<const float *>(call.up[layer])[int64_t(column + i) * rank + row];
      }
    }
    lcm::store<V>(static_cast<T *>(call.narrow_factors) + element, values);
  }
}

// V adjacent numbers of a factor, by accesses of 16 bytes where V says that they are aligned.
template <int V, class F> __device__ __forceinline__ void load_factor(const F *from, float (&values)[V]) {
  constexpr int kPack = V * sizeof(F) > 16 ? 16 / sizeof(F) : V;
#pragma unroll
  for (int v = 0; v < V; v += kPack) lcm::load(from + v, reinterpret_cast<float(&)[kPack]>(values[v]));
}

// Weights of type T, factors of type F.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads) merge(const LcmLowRank call, int64_t merging) {
  lcm::wait_for_previous();
  if constexpr (std::is_same_v<F, float>) {
    if (blockIdx.x >= merging) {
      copy_factors<T, V>(call, (int64_t(blockIdx.x - merging) * kThreads + threadIdx.x) * V);
      return;
    }
  }
  const unsigned columns = call.input / V, thread = blockIdx.x * kThreads + threadIdx.x;
  int tile = int(thread / columns), layer = 0;
  const int column = int(thread % columns) * V;
  while (layer < call.count && tile >= row_tiles(call, layer)) tile -= row_tiles(call, layer++);
  if (layer == call.count) return;
  const int row = tile * kRows, output = call.output[layer], rank = call.rank[layer];
  const int64_t start = (int64_t(lcm::outputs_before(call, layer)) + row) * call.input + column;
  const T *weight = static_cast<const T *>(call.weight) + start;
  T *merged = static_cast<T *>(call.merged) + start;
  float sums[kRows][V];
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    if (row + i < output) lcm::load<V>(weight + int64_t(i) * call.input, sums[i]);
  }
  const float scale = call.scale[layer];
  const F *down = static_cast<const F *>(call.down[layer]) + column;
  const F *up = static_cast<const F *>(call.up[layer]) + int64_t(row) * rank;
#pragma unroll 4
  for (int r = 0; r < rank; r++) {
    float factor[V];
    load_factor<V>(down + int64_t(r) * call.input, factor);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (row + i >= output) break;
      const float left = scale * float(up[i * rank + r]);
#pragma unroll
      for (int v = 0; v < V; v++) sums[i][v] = fmaf(left, factor[v], sums[i][v]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    if (row + i < output) lcm::store<V>(merged + int64_t(i) * call.input, sums[i]);
  }
}

} // namespace

extern "C" size_t lcm_low_rank_narrow_factors(const LcmLowRank *call) {
  return lcm::takes_narrow(*call) ? size_t(lcm::narrow_up(*call, call->count)) : 0;
}

extern "C" int lcm_low_rank_merge(const LcmLowRank *call, cudaStream_t stream) {
  if (call->count < 1 || call->count > LCM_LOW_RANK_LAYERS) return -1;
  if (call->factor_dtype != 0 && (call->factor_dtype != call->dtype || call->narrow_factors)) return -1;
  bool wide = call->input % lcm::wide(call->dtype) == 0 && lcm::aligned(call->weight, call->merged);
  for (int i = 0; i < call->count; i++) wide = wide && lcm::aligned(call->down[i]);
  if (call->narrow_factors && !(wide && lcm::takes_narrow(*call))) return -1;
  return lcm::dispatch(call->dtype, wide, [&](auto kind) {
    using Element = typename decltype(kind)::type;
    constexpr int V = decltype(kind)::width;
    int64_t tiles = 0;
    for (int i = 0; i < call->count; i++) tiles += row_tiles(*call, i);
    const int64_t merging = lcm::divide_up<int64_t>(tiles * (call->input / V), kThreads);
    const int64_t numbers = call->narrow_factors ? lcm::narrow_up(*call, call->count) : 0;
    const int64_t blocks = merging + lcm::divide_up<int64_t>(numbers / V, kThreads);
    if (blocks * kThreads > 0xffffffffll) return -1;
    const auto launch = [&](auto kernel) {
      return lcm::launch_dependent(kernel, unsigned(blocks), kThreads, 0, stream, *call, merging);
    };
    return call->factor_dtype == 0 ? launch(merge<Element, float, V>) : launch(merge<Element, Element, V>);
  });
}
