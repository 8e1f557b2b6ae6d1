// Extended attention on Hopper, forward, head dimension 64, no causal mask, bf16 or f16:
//   out[b, i, h] = softmax_j(scale q[b, i, h] . [k; k2][j, h]) [v; v2][j, h],   lse[b, h, i] = log sum_j exp(scale q . k_j)
#include "attention.h"
#include "hopper_ptx.cuh"

#include <cudaTypedefs.h>
#include <type_traits>

#ifndef WGS
#define WGS 3
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef POLY
#define POLY 0
#endif
#ifndef TOKEN
#define TOKEN 1
#endif

namespace lcm::hopper {

constexpr int D = 64;    // head dimension
constexpr int KEYS = 128; // keys of a tile
constexpr int ROWS = 64; // queries of a consumer warpgroup

template <int CONSUMERS> struct Shared {
  uint16_t q[2][CONSUMERS][ROWS * D];
  uint16_t k[STAGES][KEYS * D], v[STAGES][KEYS * D];
  uint64_t q_full[2][CONSUMERS], q_empty[2][CONSUMERS], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], turn[CONSUMERS];
};

struct Parameters {
  CUtensorMap q, k, v, k2, v2;
  void *out;
  float *lse;
  const uint8_t *use_reference;
  int64_t out_row, out_batch;
  int32_t tokens, own_tokens, reference_tokens, shared_reference, heads, query_tiles, tiles;
  float scale; // softmax scale times log2 e: everything runs on powers of two
};

// Use number n of a ring of stages: its slot, and the parity of the barrier phase that ends with its filling.
static_assert((STAGES & STAGES - 1) == 0, "slots are counted in binary");
__device__ inline uint32_t slot(uint32_t n) { return n % STAGES; }
__device__ inline uint32_t parity(uint32_t n) { return n / STAGES & 1; }

__device__ inline float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <class T> __device__ inline uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Softmax of one thread's two rows (r and r + 8 of its warp's 16) over the tiles of keys, relative to a maximum per row that need not be
// the true one: in f32 exp2(x) is as exact at 2^60 as at 1. So the maximum of the first tile serves for all the others until the weights
// of a tile grow beyond LIMIT; only then is that tile done again with a new maximum. This spares a compare per score and, more,
// lets the exponentials start without waiting for a row's maximum.
template <class T> struct Softmax {
  static constexpr float LIMIT = std::is_same_v<T, __half> ? 16384.f : 1e18f; // of a thread's sum; the weights are rounded to T
  float maximum[2], sum[2];

  // Columns from `valid` on are no keys.
  __device__ static void mask(float (&s)[KEYS / 2], int valid) {
    if (valid < KEYS) {
      const int column = (threadIdx.x & 3) * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        if (column + (i / 4) * 8 + (i & 1) >= valid) s[i] = -INFINITY;
    }
  }

  __device__ static void sums(const float (&s)[KEYS / 2], float (&t)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float a = s[row * 2], b = s[row * 2 + 1];
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) a += s[i + row * 2], b += s[i + row * 2 + 1];
      t[row] = a + b;
    }
  }

  // Scores become weights under the maximum raised to theirs; correction: what earlier weights are worth under it.
  __device__ void raise(float (&s)[KEYS / 2], float scale, float (&correction)[2]) {
    float t[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float a = s[row * 2], b = s[row * 2 + 1];
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) a = fmaxf(a, s[i + row * 2]), b = fmaxf(b, s[i + row * 2 + 1]);
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(0xffffffff, a, 1));
      a = fmaxf(a, __shfl_xor_sync(0xffffffff, a, 2));
      const float high = fmaxf(maximum[row], a * scale);
      correction[row] = exp2_unit(maximum[row] - high);
      maximum[row] = high;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = exp2_unit(fmaf(s[i], scale, -maximum[i >> 1 & 1]));
    sums(s, t);
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] = sum[row] * correction[row] + t[row];
  }

  // Scores become weights under the maximum as it is; false, in all lanes alike, if it is too low for that.
  __device__ bool keep(float (&s)[KEYS / 2], float scale) {
    float t[2], offset[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) offset[row] = (126.f - maximum[row]) * (1.f / 252);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      const int row = i >> 1 & 1;
      if (i % 16 < POLY) {
        // A share of the powers is computed on the multiply-add units, which have time to spare where the special-function units have not:
        // 2^x = 2^k 2^r, 2^r by a cubic (7e-5), k put into the exponent. x is confined to [-126, 126] by saturation.
        const float y = __saturatef(fmaf(s[i], scale * (1.f / 252), offset[row]));
        const float magic = 12582912.f - 126.f, k = fmaf(y, 252.f, magic), r = fmaf(y, 252.f, magic - k);
        const float p = fmaf(fmaf(fmaf(0.05517167f, r, 0.24261113f), r, 0.69326099f), r, 0.99992807f);
        s[i] = __int_as_float(__float_as_int(p) + (__float_as_int(k) << 23));
      } else {
        s[i] = exp2_unit(fmaf(s[i], scale, -maximum[row]));
      }
    }
    sums(s, t);
    if (__any_sync(0xffffffff, !(t[0] <= LIMIT && t[1] <= LIMIT))) return false;
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] += t[row];
    return true;
  }
};

// The scores of a warp's 16 queries and a tile's keys once more, by the warp alone. q and k: tiles in shared memory, 128-byte swizzle.
template <class T> __device__ inline void scores_again(float (&s)[KEYS / 2], const uint8_t *q, const uint8_t *k) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 4;
  const auto word = [](const uint8_t *tile, int row, int byte) {
    return *reinterpret_cast<const uint32_t *>(tile + row * 128 + (byte ^ (row & 7) << 4));
  };
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) s[i] = 0;
#pragma unroll 1
  for (int i = 0; i < D / 16; ++i) {
    const int at = column + i * 32;
    const uint32_t a[4] = {word(q, row, at), word(q, row + 8, at), word(q, row, at + 16), word(q, row + 8, at + 16)};
#pragma unroll
    for (int block = 0; block < KEYS / 8; ++block) {
      const int key = block * 8 + threadIdx.x % 32 / 4;
      mma_16x8x16<T>(s + block * 4, a, word(k, key, at), word(k, key, at + 16));
    }
  }
}

template <class T, int CONSUMERS>
__global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1) attention_forward(const __grid_constant__ Parameters p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  auto &shared = *reinterpret_cast<Shared<CONSUMERS> *>(raw + (1024 - (shared_address(raw) & 1023)) % 1024);
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0); // the same in all lanes, and the compiler knows it
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i)
      for (int w = 0; w < CONSUMERS; ++w) barrier_init(&shared.q_full[i][w], 1), barrier_init(&shared.q_empty[i][w], 4);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&shared.k_full[i], 1), barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.k_empty[i], 4 * CONSUMERS), barrier_init(&shared.v_empty[i], 4 * CONSUMERS);
    }
    for (int w = 0; w < CONSUMERS; ++w) barrier_init(&shared.turn[w], 4);
    barrier_init_done();
  }
  __syncthreads();
  const int own_tiles = (p.own_tokens + KEYS - 1) / KEYS, reference_tiles = (p.reference_tokens + KEYS - 1) / KEYS;

  if (group == 0) {
    registers_lower<CONSUMERS == 3 ? 32 : 24>();
    if (threadIdx.x == 0) {
      uint32_t n = 0; // tiles of keys so far
      uint32_t turn = 0;
      for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++turn) {
        const int pair = tile / p.query_tiles, start = (tile - pair * p.query_tiles) * (ROWS * CONSUMERS);
        const int b = pair / p.heads, h = pair - b * p.heads;
        for (int w = 0; w < CONSUMERS; ++w) {
          barrier_wait(&shared.q_empty[turn & 1][w], (turn >> 1 & 1) ^ 1);
          barrier_expect(&shared.q_full[turn & 1][w], ROWS * D * 2);
          load_box(shared.q[turn & 1][w], &p.q, &shared.q_full[turn & 1][w], 0, h, start + w * ROWS, b);
        }
        const int count = own_tiles + (p.use_reference == nullptr || p.use_reference[b] ? reference_tiles : 0);
        for (int i = 0; i < count; ++i, ++n) {
          const bool own = i < own_tiles;
          const int row = (own ? i : i - own_tiles) * KEYS, sample = own || !p.shared_reference ? b : 0;
          barrier_wait(&shared.k_empty[slot(n)], parity(n) ^ 1);
          barrier_expect(&shared.k_full[slot(n)], KEYS * D * 2);
          load_box(shared.k[slot(n)], own ? &p.k : &p.k2, &shared.k_full[slot(n)], 0, h, row, sample);
          barrier_wait(&shared.v_empty[slot(n)], parity(n) ^ 1);
          barrier_expect(&shared.v_full[slot(n)], KEYS * D * 2);
          load_box(shared.v[slot(n)], own ? &p.v : &p.v2, &shared.v_full[slot(n)], 0, h, row, sample);
        }
      }
    }
  } else {
    registers_raise<CONSUMERS == 3 ? 160 : 240>();
    const int w = group - 1, lane = threadIdx.x & 31;
    const bool speaks = lane == 0;
    uint32_t n = 0; // tiles of keys so far; the values trail by one
    uint32_t turn = 0;
#if TOKEN
    // The right to issue matrix products goes round among the warpgroups, so that one's softmax runs beside another's products.
    if (w == CONSUMERS - 1 && speaks) barrier_arrive(&shared.turn[0]);
#endif
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++turn) {
      const int count = own_tiles + (p.use_reference == nullptr || p.use_reference[tile / p.query_tiles / p.heads] ? reference_tiles : 0);
      const auto valid = [&](int i) {
        return i < own_tiles ? p.own_tokens - i * KEYS : p.reference_tokens - (i - own_tiles) * KEYS;
      };
      float o[D / 2], s[KEYS / 2];
      uint32_t weights[KEYS / 4];
      Softmax<T> softmax;
      softmax.maximum[0] = softmax.maximum[1] = -INFINITY, softmax.sum[0] = softmax.sum[1] = 0;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0;
      const uint64_t q = describe(shared.q[turn & 1][w]);

      // Issue the products with key tile m, with value tile m.
      const auto scores = [&](uint32_t m) {
        const uint64_t k = describe(shared.k[slot(m)]);
        pin(s);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) wgmma_64x128_shared<T>(s, q + i * 2, k + i * 2, i != 0);
        wgmma_commit();
      };
      const auto products = [&](uint32_t m) {
        barrier_wait(&shared.v_full[slot(m)], parity(m));
        const uint64_t v = describe(shared.v[slot(m)]);
        pin(o);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) wgmma_64x64_registers<T>(o, weights + i * 4, v + i * 128);
        wgmma_commit();
      };
      const auto packed = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack<T>(s[i * 2], s[i * 2 + 1]);
      };
      const auto take_turn = [&]() { barrier_wait(&shared.turn[w], n & 1); };
      const auto pass_turn = [&]() {
        if (speaks) barrier_arrive(&shared.turn[w == CONSUMERS - 1 ? 0 : w + 1]);
      };

      barrier_wait(&shared.q_full[turn & 1][w], turn >> 1 & 1);
      barrier_wait(&shared.k_full[slot(n)], parity(n));
      take_turn();
      scores(n);
      pass_turn();
      wgmma_wait<0>();
      pin(s);
      if (speaks) barrier_arrive(&shared.k_empty[slot(n)]);
      softmax.mask(s, valid(0));
      float none[2]; // nothing to correct yet
      softmax.raise(s, p.scale, none);
      packed();
      if (++n, count > 1) barrier_wait(&shared.k_full[slot(n)], parity(n));
      for (int i = 1; i < count; ++i, ++n) {
        take_turn();
        scores(n);
        products(n - 1);
        pass_turn();
        wgmma_wait<1>();
        pin(s);
        softmax.mask(s, valid(i));
        if (!softmax.keep(s, p.scale)) {
          wgmma_wait<0>();
          pin(o);
          scores_again<T>(s, reinterpret_cast<const uint8_t *>(shared.q[turn & 1][w]), reinterpret_cast<const uint8_t *>(shared.k[slot(n)]));
          softmax.mask(s, valid(i));
          float correction[2];
          softmax.raise(s, p.scale, correction);
#pragma unroll
          for (int j = 0; j < D / 2; ++j) o[j] *= correction[j >> 1 & 1];
        }
        if (speaks) barrier_arrive(&shared.k_empty[slot(n)]);
        pin(s); // the exponentials stay before the wait: they run beside the product with the values
        if (i + 1 < count) barrier_wait(&shared.k_full[slot(n + 1)], parity(n + 1));
        wgmma_wait<0>();
        pin(o);
        if (speaks) barrier_arrive(&shared.v_empty[slot(n - 1)]);
        packed();
      }
      if (speaks) barrier_arrive(&shared.q_empty[turn & 1][w]);
      products(n - 1);
      int place = tile; // taken apart only now, so that its parts hold no registers in the loop
      asm volatile("" : "+r"(place));
      const int pair = place / p.query_tiles, start = (place - pair * p.query_tiles) * (ROWS * CONSUMERS);
      const int b = pair / p.heads, h = pair - b * p.heads;
      float inverse[2];
      const int first = start + w * ROWS + (threadIdx.x / 32 % 4) * 16 + lane / 4, column = lane & 3;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float sum = softmax.sum[row];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        inverse[row] = 1.0f / sum;
        if (p.lse != nullptr && column == 0 && first + row * 8 < p.tokens)
          p.lse[(int64_t)pair * p.tokens + first + row * 8] = (softmax.maximum[row] + log2f(sum)) * 0.6931471805599453f;
      }
      wgmma_wait<0>();
      pin(o);
      if (speaks) barrier_arrive(&shared.v_empty[slot(n - 1)]);
      // A thread holds 2 neighbouring columns of each of 8 groups of 8; the four threads of a row trade them for whole groups (16 bytes),
      // so that a row is written in whole sectors.
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        T *out = static_cast<T *>(p.out) + b * p.out_batch + (first + row * 8) * p.out_row + h * D;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t mine[4], whole[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = (half * 4 + j) * 4 + row * 2;
            mine[j] = pack<T>(o[at] * inverse[row], o[at + 1] * inverse[row]);
          }
          // round r: thread c sends the group of thread c ^ r, and gets its own group's columns of thread c ^ r
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int to = column ^ r;
            const uint32_t send = to & 2 ? (to & 1 ? mine[3] : mine[2]) : (to & 1 ? mine[1] : mine[0]);
            const uint32_t got = __shfl_xor_sync(0xffffffff, send, r);
#pragma unroll
            for (int j = 0; j < 4; ++j) whole[j] = r == 0 ? (to == j ? got : 0) : (to == j ? got : whole[j]);
          }
          if (first + row * 8 < p.tokens)
            *reinterpret_cast<uint4 *>(out + half * 32 + column * 8) = make_uint4(whole[0], whole[1], whole[2], whole[3]);
        }
      }
    }
  }
#endif
}

// A tensor map of rows of heads of 64: boxes of one head, `rows` tokens, zero beyond the last token.
inline bool map_operand(CUtensorMap *map, int dtype, const void *base, int heads, int tokens, int batch, int64_t row, int64_t sample, int rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) != cudaSuccess) entry = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  if (encode == nullptr || reinterpret_cast<uintptr_t>(base) % 16 || row % 8 || (batch > 1 && sample % 8) || row < heads * D) return false;
  if (batch == 1) sample = row * tokens;
  const cuuint64_t sizes[4] = {D, (cuuint64_t)heads, (cuuint64_t)tokens, (cuuint64_t)batch};
  const cuuint64_t strides[3] = {D * 2, (cuuint64_t)row * 2, (cuuint64_t)sample * 2};
  const cuuint32_t box[4] = {D, 1, (cuuint32_t)rows, 1}, steps[4] = {1, 1, 1, 1};
  return encode(map, dtype == 1 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void *>(base), sizes, strides, box,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, int CONSUMERS> int launch(const LcmAttention &a, Parameters &p, int processors, cudaStream_t stream) {
  if (!map_operand(&p.q, a.dtype, a.q, a.heads, a.tokens, a.batch, a.q_row, a.q_batch, ROWS)) return -1;
  p.query_tiles = (a.tokens + ROWS * CONSUMERS - 1) / (ROWS * CONSUMERS);
  p.tiles = p.query_tiles * a.heads * a.batch;
  const int bytes = sizeof(Shared<CONSUMERS>) + 1024;
  const cudaError_t e = cudaFuncSetAttribute(attention_forward<T, CONSUMERS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return e;
  attention_forward<T, CONSUMERS><<<p.tiles < processors ? p.tiles : processors, 128 * (CONSUMERS + 1), bytes, stream>>>(p);
  return cudaGetLastError();
}

} // namespace lcm::hopper

extern "C" int lcm_attention_forward_hopper(const LcmAttention *args, cudaStream_t stream) {
  using namespace lcm::hopper;
  const LcmAttention &a = *args;
  int device, major, minor, processors;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || major != 9 || minor != 0)
    return -1;
  const bool reference = a.k2 != nullptr && a.reference_tokens > 0;
  if (a.head_dim != D || a.causal || (a.dtype != 1 && a.dtype != 2) || !(a.scale > 0) || a.batch < 1 || a.heads < 1 || a.tokens < 1 || a.own_tokens < 1 ||
      reinterpret_cast<uintptr_t>(a.out) % 16 || a.out_row % 8 || (a.batch > 1 && a.out_batch % 8) || (reference && a.reference_batch != 1 && a.reference_batch != a.batch))
    return -1;
  Parameters p{};
  if (!map_operand(&p.k, a.dtype, a.k, a.heads, a.own_tokens, a.batch, a.k_row, a.k_batch, KEYS) ||
      !map_operand(&p.v, a.dtype, a.v, a.heads, a.own_tokens, a.batch, a.v_row, a.v_batch, KEYS))
    return -1;
  if (reference && (!map_operand(&p.k2, a.dtype, a.k2, a.heads, a.reference_tokens, a.reference_batch, a.k2_row, a.k2_batch, KEYS) ||
                    !map_operand(&p.v2, a.dtype, a.v2, a.heads, a.reference_tokens, a.reference_batch, a.v2_row, a.v2_batch, KEYS)))
    return -1;
  p.out = a.out, p.lse = a.lse, p.use_reference = a.use_reference, p.out_row = a.out_row, p.out_batch = a.out_batch;
  p.tokens = a.tokens, p.own_tokens = a.own_tokens, p.reference_tokens = reference ? a.reference_tokens : 0, p.shared_reference = a.reference_batch == 1;
  p.heads = a.heads, p.scale = a.scale * 1.4426950408889634f;
#ifdef ONLY_BF16
  return launch<__nv_bfloat16, WGS>(a, p, processors, stream);
#else
  return a.dtype == 1 ? launch<__nv_bfloat16, WGS>(a, p, processors, stream) : launch<__half, WGS>(a, p, processors, stream);
#endif
}
