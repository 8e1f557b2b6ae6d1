// Lookup of rows of a table. The gradient gives each block one token: the block of the first token of an id adds up the
// gradients of all tokens of that id in order, the others leave. Prompts are short (77 tokens a sample), so reading all
// ids in every block costs less than sorting them, and no atomics leave the order of a sum to chance.
#include "embedding.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

template <class T>
struct Lookup {
  const T *table;
  const uint32_t *ids;
  T *y;
  int64_t entries;
  unsigned channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t token;
    unsigned c;
    split_index<V>(i, channels, token, c);
    uint32_t id = ids[token];
    Pack<T, V> pack;
    if (id < entries) {
      pack = load_pack<V>(table + static_cast<int64_t>(id) * channels + c);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) pack.values[k] = T(0.0f);
    }
    *reinterpret_cast<Pack<T, V> *>(y + i) = pack;
  }
};

// Grid: (tokens). dtable is zero before.
template <class T>
__global__ void __launch_bounds__(256)
    add_tokens(const uint32_t *ids, const T *dy, float *dtable, int tokens, int64_t entries, int channels) {
  int own = blockIdx.x;
  uint32_t id = ids[own];
  if (id >= entries) return;
  int before = 0;
  for (int token = threadIdx.x; token < own; token += blockDim.x) before |= ids[token] == id;
  if (__syncthreads_or(before)) return;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    float sum = 0.0f;
    for (int token = own; token < tokens; ++token)
      if (ids[token] == id) sum += static_cast<float>(dy[static_cast<int64_t>(token) * channels + c]);
    dtable[static_cast<int64_t>(id) * channels + c] = sum;
  }
}

} // namespace

extern "C" int lcm_embedding_forward(const void *table, const uint32_t *ids, void *y, int64_t tokens, int64_t entries,
                                     int channels, int dtype, cudaStream_t stream) {
  if (tokens < 0 || entries < 0 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(table, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Lookup<T> f{(const T *)table, ids, (T *)y, entries, (unsigned)channels};
    return map<decltype(kind)::width>(f, tokens * channels, stream);
  });
}

extern "C" int lcm_embedding_backward(const uint32_t *ids, const void *dy, float *dtable, int64_t tokens,
                                      int64_t entries, int channels, int dtype, cudaStream_t stream) {
  if (tokens < 0 || tokens >= (1ll << 31) || entries < 0 || channels < 1) return -1;
  if (entries == 0) return 0;
  cudaError_t error = cudaMemsetAsync(dtable, 0, sizeof(float) * entries * channels, stream);
  if (error != cudaSuccess || tokens == 0) return static_cast<int>(error);
  return dispatch(dtype, false, [&](auto kind) {
    using T = typename decltype(kind)::type;
    add_tokens<T><<<static_cast<unsigned>(tokens), 256, 0, stream>>>(ids, (const T *)dy, dtable, static_cast<int>(tokens),
                                                                     entries, channels);
    return launched();
  });
}
