// Gathering of rows: a thread moves one pack. Forward and backward are the same kernel, as no row is wanted twice: the
// gradient gathers by the inverse of the indices, so nothing is added and nothing is zeroed first.
#include "select_tokens.h"

#include "../elements.cuh"

using namespace lcm;

namespace {

template <class T>
struct Gather {
  const T *from;
  T *to;
  const uint32_t *indices;
  unsigned tokens_from, tokens_to, channels;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned c;
    split_index<V>(i, channels, row, c);
    unsigned sample = static_cast<unsigned>(row) / tokens_to;
    uint32_t index = indices[static_cast<unsigned>(row) - sample * tokens_to];
    Pack<T, V> pack;
    if (index != 0xffffffffu) {
      pack = load_pack<V>(from + (static_cast<int64_t>(sample) * tokens_from + index) * channels + c);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) pack.values[k] = T(0.f);
    }
    *reinterpret_cast<Pack<T, V> *>(to + i) = pack;
  }
};

} // namespace

extern "C" int lcm_select_tokens(const void *from, void *to, const uint32_t *indices, int64_t batch, int tokens_from,
                                 int tokens_to, int channels, int dtype, cudaStream_t stream) {
  if (batch < 0 || tokens_from < 1 || tokens_to < 1 || channels < 1) return -1;
  return dispatch(dtype, channels % wide(dtype) == 0 && aligned(from, to), [&](auto kind) {
    using T = typename decltype(kind)::type;
    Gather<T> f{(const T *)from, (T *)to, indices, (unsigned)tokens_from, (unsigned)tokens_to, (unsigned)channels};
    return map<decltype(kind)::width>(f, batch * tokens_to * channels, stream);
  });
}
