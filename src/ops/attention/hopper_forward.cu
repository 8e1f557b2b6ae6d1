// Extended attention on Hopper, forward, head dimension 64, no causal mask, bf16 or f16:
//   out[b, i, h] = softmax_j(scale q[b, i, h] . [k; k2][j, h]) [v; v2][j, h],   lse[b, h, i] = log sum_j exp(scale q . k_j)
// The two sources of keys are read where they lie, one after the other; a tile of keys never straddles them.
//
// A thread block is one thread that copies (TMA, a ring of tiles of keys and values, the queries in double buffer) and CONSUMERS
// warpgroups that compute, 64 queries each; blocks stay and take tiles of queries in turn. At head dimension 64 the exponentials of
// a tile take the special-function units as long (512 cycles) as its products take the tensor cores, so both have to run all the
// time: the warpgroups take turns in issuing products, and while those of one are under way the others are at their exponentials.
// A warpgroup issues the products of its present weights and the next scores together, and waits for both: to overlap its own
// exponentials with its own products as well (scores in two halves, or weights a tile behind) was measured no faster or slower, as
// was computing a share of the exponentials by a polynomial on the multiply-add units.
#include "../dependent_launch.cuh"
#include "attention.h"
#include "hopper_ptx.cuh"
#include "hopper_softmax.cuh"

#include <cudaTypedefs.h>

namespace lcm::hopper {

constexpr int ROWS = 64;        // queries of a consumer warpgroup
constexpr int STAGES = 4;       // tiles of keys and of values in flight

template <int CONSUMERS> struct Shared {
  uint16_t q[2][CONSUMERS][ROWS * D];
  uint16_t k[STAGES][KEYS * D], v[STAGES][KEYS * D];
  uint64_t q_full[2][CONSUMERS], q_empty[2][CONSUMERS], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], right[CONSUMERS];
};

struct Parameters {
  CUtensorMap q, k, v, k2, v2;
  void *out;
  float *lse;
  const uint8_t *use_reference;
  int64_t out_row, out_batch;
  int32_t tokens, own_tokens, reference_tokens, shared_reference, heads, query_tiles, tiles;
  float scale; // softmax scale times log2 e: everything runs on powers of two

  __device__ int sample(int tile) const { return tile / query_tiles / heads; }
  __device__ int own_tiles() const { return (own_tokens + KEYS - 1) / KEYS; }
  // Tiles of keys that a tile of queries sees.
  __device__ int key_tiles(int tile) const {
    return own_tiles() + (use_reference == nullptr || use_reference[sample(tile)] ? (reference_tokens + KEYS - 1) / KEYS : 0);
  }
};

// Use number n of a ring of stages: its slot, and the parity of the barrier phase that ends with its filling.
static_assert((STAGES & STAGES - 1) == 0, "slots are counted in binary");
__device__ inline uint32_t slot(uint32_t n) { return n % STAGES; }
__device__ inline uint32_t parity(uint32_t n) { return n / STAGES & 1; }

// The copying thread: queries of each tile in double buffer, tiles of keys and values through the ring.
template <int CONSUMERS> __device__ inline void produce(Shared<CONSUMERS> &shared, const Parameters &p) {
  uint32_t n = 0, turn = 0; // tiles of keys, of queries so far
  const int own_tiles = p.own_tiles();
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++turn) {
    const int pair = tile / p.query_tiles, start = (tile - pair * p.query_tiles) * (ROWS * CONSUMERS);
    const int b = pair / p.heads, h = pair - b * p.heads, count = p.key_tiles(tile);
    for (int w = 0; w < CONSUMERS; ++w) {
      uint64_t *full = &shared.q_full[turn & 1][w];
      barrier_wait(&shared.q_empty[turn & 1][w], (turn >> 1 & 1) ^ 1);
      barrier_expect(full, ROWS * D * 2);
      load_box(shared.q[turn & 1][w], &p.q, full, 0, h, start + w * ROWS, b);
    }
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

// Writes a warp's 16 rows of a tile: o / sum, and the logarithm of the sum.
template <class T, int CONSUMERS>
__device__ inline void finish(const Parameters &p, int tile, int w, const float (&o)[D / 2], const Softmax<T> &softmax) {
  const int pair = tile / p.query_tiles, start = (tile - pair * p.query_tiles) * (ROWS * CONSUMERS), b = pair / p.heads, h = pair - b * p.heads;
  const int lane = threadIdx.x % 32, column = lane % 4, first = start + w * ROWS + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int at = first + row * 8;
    float sum = softmax.sum[row];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (p.lse != nullptr && column == 0 && at < p.tokens)
      p.lse[(int64_t)pair * p.tokens + at] = (softmax.maximum[row] + log2f(sum)) * 0.6931471805599453f;
    const float inverse = 1 / sum;
    // A thread holds 2 neighbouring columns of each of 8 groups of 8; the four threads of a row trade them for whole groups
    // (16 bytes), so that whole sectors are written.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t mine[4], whole[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) mine[j] = pack<T>(o[(half * 4 + j) * 4 + row * 2] * inverse, o[(half * 4 + j) * 4 + row * 2 + 1] * inverse);
#pragma unroll
      for (int r = 0; r < 4; ++r) { // thread c sends its part of group c ^ r to the thread of that name
        const int to = column ^ r;
        const uint32_t got = __shfl_xor_sync(0xffffffff, to & 2 ? (to & 1 ? mine[3] : mine[2]) : (to & 1 ? mine[1] : mine[0]), r);
#pragma unroll
        for (int j = 0; j < 4; ++j) whole[j] = r == 0 || to == j ? got : whole[j];
      }
      if (at < p.tokens)
        *reinterpret_cast<uint4 *>(static_cast<T *>(p.out) + b * p.out_batch + at * p.out_row + h * D + half * 32 + column * 8) =
            make_uint4(whole[0], whole[1], whole[2], whole[3]);
    }
  }
}

// A consumer warpgroup, number w.
template <class T, int CONSUMERS> __device__ inline void consume(Shared<CONSUMERS> &shared, const Parameters &p, int w) {
  const bool speaks = threadIdx.x % 32 == 0; // for its warp, at the barriers
  const int own_tiles = p.own_tiles();
  uint32_t n = 0, turn = 0; // tiles of keys, of queries so far
  float o[D / 2], s[KEYS / 2];
  uint32_t weights[KEYS / 4];
  // Issues the products of the queries of a turn with key tile n; of the weights with value tile n.
  const auto scores = [&](uint32_t turn, uint32_t n) {
    const uint64_t q = describe(shared.q[turn & 1][w]), k = describe(shared.k[slot(n)]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) wgmma_64x128_shared<T>(s, q + i * 2, k + i * 2, i != 0);
    wgmma_commit();
  };
  const auto products = [&](uint32_t n) {
    const uint64_t v = describe(shared.v[slot(n)]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) wgmma_64x64_registers<T>(o, weights + i * 4, v + i * 128);
    wgmma_commit();
  };
  const auto weigh = [&]() {
#pragma unroll
    for (int j = 0; j < KEYS / 4; ++j) weights[j] = pack<T>(s[j * 2], s[j * 2 + 1]);
  };
  // The right to issue products goes round among the warpgroups, so that they don't all come to the tensor cores at once.
  const auto take_right = [&](uint32_t n) { barrier_wait(&shared.right[w], n & 1); };
  const auto pass_right = [&]() {
    if (speaks) barrier_arrive(&shared.right[w == CONSUMERS - 1 ? 0 : w + 1]);
  };
  if (w == CONSUMERS - 1) pass_right();

  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++turn) {
    const int count = p.key_tiles(tile);
    const auto valid = [&](int i) { return i < own_tiles ? p.own_tokens - i * KEYS : p.reference_tokens - (i - own_tiles) * KEYS; };
    Softmax<T> softmax;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;

    barrier_wait(&shared.q_full[turn & 1][w], turn >> 1 & 1);
    barrier_wait(&shared.k_full[slot(n)], parity(n));
    take_right(n);
    pin(s);
    scores(turn, n);
    pass_right();
    wgmma_wait<0>();
    pin(s);
    if (speaks) barrier_arrive(&shared.k_empty[slot(n)]);
    mask(s, valid(0));
    float correction[2]; // nothing to correct yet
    softmax.raise(s, p.scale, correction);
    weigh();
    if (++n, count > 1) barrier_wait(&shared.k_full[slot(n)], parity(n));
    for (int i = 1; i < count; ++i, ++n) {
      // Here weights holds those of key tile i - 1, and no product is under way.
      take_right(n);
      barrier_wait(&shared.v_full[slot(n - 1)], parity(n - 1));
      pin(o);
      products(n - 1);
      pin(s);
      scores(turn, n);
      wgmma_wait<1>();
      pass_right();
      wgmma_wait<0>();
      pin(s);
      pin(o);
      if (speaks) barrier_arrive(&shared.v_empty[slot(n - 1)]);
      mask(s, valid(i));
      if (!softmax.keep(s, p.scale)) {
        scores_again<T>(s, reinterpret_cast<const uint8_t *>(shared.q[turn & 1][w]), reinterpret_cast<const uint8_t *>(shared.k[slot(n)]));
        mask(s, valid(i));
        softmax.raise(s, p.scale, correction);
#pragma unroll
        for (int j = 0; j < D / 2; ++j) o[j] *= correction[j >> 1 & 1];
      }
      if (speaks) barrier_arrive(&shared.k_empty[slot(n)]);
      weigh();
      if (i + 1 < count) barrier_wait(&shared.k_full[slot(n + 1)], parity(n + 1));
    }
    if (speaks) barrier_arrive(&shared.q_empty[turn & 1][w]);
    barrier_wait(&shared.v_full[slot(n - 1)], parity(n - 1));
    pin(o);
    products(n - 1);
    wgmma_wait<0>();
    pin(o);
    if (speaks) barrier_arrive(&shared.v_empty[slot(n - 1)]);
    int place = tile;
    asm volatile("" : "+r"(place)); // taken apart only here, so that its parts hold no registers in the loop
    finish<T, CONSUMERS>(p, place, w, o, softmax);
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
    for (int w = 0; w < CONSUMERS; ++w) barrier_init(&shared.right[w], 4);
    barrier_init_done();
  }
  wait_for_previous();
  __syncthreads();
  if (group == 0) {
    registers_lower<CONSUMERS == 3 ? 32 : 24>();
    if (threadIdx.x == 0) produce<CONSUMERS>(shared, p);
  } else {
    registers_raise<CONSUMERS == 3 ? 160 : 240>();
    consume<T, CONSUMERS>(shared, p, group - 1);
  }
#endif
}

// A tensor map of rows of heads of 64: boxes of one head, `rows` tokens, zero beyond the last token.
inline bool map_operand(CUtensorMap *map, int dtype, const void *base, int heads, int tokens, int batch, int64_t row, int64_t sample, int rows) {
  // Looked up once; threads that come at the same time find the same. (A guarded initialiser would want the C++ runtime library.)
  static void *found = nullptr;
  void *entry = __atomic_load_n(&found, __ATOMIC_RELAXED);
  if (entry == nullptr) {
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result) != cudaSuccess) return false;
    __atomic_store_n(&found, entry, __ATOMIC_RELAXED);
  }
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
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
  return launch_dependent(attention_forward<T, CONSUMERS>, p.tiles < processors ? p.tiles : processors, 128 * (CONSUMERS + 1), bytes, stream, p);
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
  return a.dtype == 1 ? launch<__nv_bfloat16, 3>(a, p, processors, stream) : launch<__half, 3>(a, p, processors, stream);
}
