// Copies: casts between dtypes, rows with strides, concatenation on the last axis and its inverse.
//
// What does not compute copies bytes, in the widest words that divide the rows, the strides and the addresses: the
// element type does not matter.
#include "../elements.cuh"
#include "elementwise.h"

using namespace lcm;

namespace {

template <class From, class To>
struct Cast {
  const From *from;
  To *to;
  template <int V>
  __device__ void at(int64_t i) const {
    float values[V];
    load<V>(from + i, values);
    store<V>(to + i, values);
  }
};

template <class From, class To>
int cast(const void *from, void *to, int64_t count, cudaStream_t stream) {
  Cast<From, To> f{(const From *)from, (To *)to};
  return aligned(from, to) ? map<8>(f, count, stream) : map<1>(f, count, stream);
}

template <class From>
int cast_to(const void *from, void *to, int64_t count, int dtype, cudaStream_t stream) {
  switch (dtype) {
    case 0: return cast<From, float>(from, to, count, stream);
    case 1: return cast<From, __nv_bfloat16>(from, to, count, stream);
    case 2: return cast<From, __half>(from, to, count, stream);
    default: return -1;
  }
}

// Rows of `columns` words.
template <class Word>
struct CopyRows {
  const Word *from;
  Word *to;
  unsigned columns;
  int64_t from_stride, to_stride;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned column;
    split_index<1>(i, columns, row, column);
    to[row * to_stride + column] = from[row * from_stride + column];
  }
};

// Rows of `columns_a` and `columns_b` words, apart and joined. `split`: from joined to apart.
template <class Word, bool split>
struct Join {
  Word *a, *b, *joined;
  unsigned columns_a, columns_b;
  template <int V>
  __device__ void at(int64_t i) const {
    int64_t row;
    unsigned column;
    split_index<1>(i, columns_a + columns_b, row, column);
    Word *part = column < columns_a ? a + row * columns_a + column : b + row * columns_b + (column - columns_a);
    if constexpr (split) *part = joined[i]; else joined[i] = *part;
  }
};

// Calls `f` with a value of the widest type of word, up to 16 bytes, that divides the number `bits` (addresses and
// lengths in bytes, or-ed together).
template <class F>
int by_word(uint64_t bits, F f) {
  if (bits % 16 == 0) return f(uint4{});
  if (bits % 8 == 0) return f(uint2{});
  if (bits % 4 == 0) return f(uint32_t{});
  if (bits % 2 == 0) return f(uint16_t{});
  return f(uint8_t{});
}

uint64_t address(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer); }

bool is_element(int bytes) { return bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8; }

template <bool split>
int join(void *a, void *b, void *joined, int64_t rows, int64_t channels_a, int64_t channels_b, int element_bytes,
                cudaStream_t stream) {
  int64_t width_a = channels_a * element_bytes, width_b = channels_b * element_bytes;
  if (rows < 0 || channels_a < 0 || channels_b < 0 || !is_element(element_bytes) || width_a + width_b > 0xffffffffll)
    return -1;
  if (rows == 0 || width_a + width_b == 0) return 0;
  return by_word(address(a) | address(b) | address(joined) | width_a | width_b, [&](auto word) {
    using Word = decltype(word);
    constexpr int64_t size = sizeof(Word);
    Join<Word, split> f{(Word *)a, (Word *)b, (Word *)joined, (unsigned)(width_a / size), (unsigned)(width_b / size)};
    return map<1>(f, rows * ((width_a + width_b) / size), stream);
  });
}

} // namespace

extern "C" int lcm_elementwise_cast(const void *from, void *to, int64_t count, int from_dtype, int to_dtype,
                                    cudaStream_t stream) {
  switch (from_dtype) {
    case 0: return cast_to<float>(from, to, count, to_dtype, stream);
    case 1: return cast_to<__nv_bfloat16>(from, to, count, to_dtype, stream);
    case 2: return cast_to<__half>(from, to, count, to_dtype, stream);
    default: return -1;
  }
}

extern "C" int lcm_elementwise_copy_rows(const void *from, void *to, int64_t rows, int64_t channels, int64_t from_stride,
                                         int64_t to_stride, int element_bytes, cudaStream_t stream) {
  if (rows < 0 || channels < 0 || !is_element(element_bytes)) return -1;
  int64_t width = channels * element_bytes, from_step = from_stride * element_bytes, to_step = to_stride * element_bytes;
  if (width > 0xffffffffll) return -1;
  if (rows == 0 || width == 0) return 0;
  return by_word(address(from) | address(to) | width | from_step | to_step, [&](auto word) {
    using Word = decltype(word);
    constexpr int64_t size = sizeof(Word);
    CopyRows<Word> f{(const Word *)from, (Word *)to, (unsigned)(width / size), from_step / size, to_step / size};
    return map<1>(f, rows * (width / size), stream);
  });
}

extern "C" int lcm_elementwise_concat(const void *a, const void *b, void *out, int64_t rows, int64_t channels_a,
                                      int64_t channels_b, int element_bytes, cudaStream_t stream) {
  return join<false>(const_cast<void *>(a), const_cast<void *>(b), out, rows, channels_a, channels_b, element_bytes,
                     stream);
}

extern "C" int lcm_elementwise_split(const void *x, void *a, void *b, int64_t rows, int64_t channels_a,
                                     int64_t channels_b, int element_bytes, cudaStream_t stream) {
  int64_t channels = channels_a + channels_b;
  if (a && b) return join<true>(a, b, const_cast<void *>(x), rows, channels_a, channels_b, element_bytes, stream);
  if (a) return lcm_elementwise_copy_rows(x, a, rows, channels_a, channels, channels_a, element_bytes, stream);
  if (!b) return 0;
  const void *rest = static_cast<const char *>(x) + channels_a * element_bytes;
  return lcm_elementwise_copy_rows(rest, b, rows, channels_b, channels, channels_b, element_bytes, stream);
}
