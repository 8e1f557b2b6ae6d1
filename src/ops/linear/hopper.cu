// Linear layers on Hopper: y = x W^T + b (+ residual), and the same with the gated GELU behind it, whose projection, twice as wide as y,
// is then never written.
//
// A block makes tiles of 128 rows x 160 columns of the product. Two warpgroups take turns, each with a tile of its own:
// while one finishes and writes its tile, the other has the tensor cores. A producer warp fills the stages they read, in the
// order of the tiles. Gated, the 160 columns are 80 of the values and the same 80 of the gates.
//
// A tile is finished in two steps: the sums and biases are rounded and put into shared memory by straight-line code (an
// array of registers can only be indexed so), which is kept short, for what it costs is the fetching of instructions; then a
// loop reads whole 16 bytes of it, does the gating or adds the residual, and writes rows.
#include "linear.h"

#include "../activation/activation.cuh"
#include "../hopper_gemm.h"
#include "../hopper.cuh"

using namespace hopper;

namespace {

constexpr int kRows = 128, kColumns = 160, kDepth = 64;
constexpr int kThreads = 384; // producer warpgroup and two consumers
constexpr int kGroup = 8;     // clusters of rows that are walked together with all columns, for the second-level cache

struct Product {
  CUtensorMap x, weight;
  const void *bias, *residual;
  void *y;
  int rows, columns, steps; // of y; of 64 numbers of K
  int tiles_m, tiles_n, tiles, cm, cn;
};

namespace layout { // of shared memory
constexpr int kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2, kStage = kA + kB, kStages = 5;
constexpr int kPitch = kColumns * 2 + 16; // bytes from row to row of a finished tile: an odd number of 16s, so 8 rows lie in different banks
constexpr int kStaging = kStages * kStage, kFull = kStaging + kRows * kPitch, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
static_assert(kBytes <= 227 * 1024, "");
} // namespace layout

// Numbers of the barriers among warps; each has one for either warpgroup, from these on.
enum Barrier { kMayMultiply = 1, kMayStage = 3, kStaged = 5 };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void load_2d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void load_2d_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier, uint16_t blocks, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1) : "memory");
}
// Arrives at a named barrier without waiting there.
__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "r"(from));
  return words;
}

struct Tile {
  int m, n;
};
__device__ __forceinline__ Tile locate(const Product &p, int index, int rank_m, int rank_n) {
  int group = index / (kGroup * p.tiles_n), inside = index - group * kGroup * p.tiles_n;
  int height = min(kGroup, p.tiles_m - group * kGroup);
  return {(group * kGroup + inside % height) * p.cm + rank_m, inside / height * p.cn + rank_n};
}

template <bool kHalf> __device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (kHalf) return __half22float2(*reinterpret_cast<__half2 *>(&word));
  else return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&word));
}
template <bool kHalf> __device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (kHalf) {
    __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
  }
}
template <bool kHalf> __device__ __forceinline__ uint32_t gate(uint32_t values, uint32_t gates) {
  const float2 v = unpack<kHalf>(values), g = unpack<kHalf>(gates);
  return pack<kHalf>(v.x * (g.x * lcm::normal_distribution(g.x)), v.y * (g.y * lcm::normal_distribution(g.y)));
}

// The producer: one thread that keeps the stages filled.
template <bool kGated>
__device__ __forceinline__ void produce(const Product &p, uint32_t stages, uint32_t full, uint32_t empty, int rank_m, int rank_n, int cluster, int clusters) {
  using namespace layout;
  uint16_t mask_a = 0, mask_b = 0; // blocks that read the same rows of x, the same weights
  for (int i = 0; i < p.cn; ++i) mask_a |= 1 << (rank_m * p.cn + i);
  for (int i = 0; i < p.cm; ++i) mask_b |= 1 << (i * p.cn + rank_n);
  int stage = 0;
  uint32_t parity = 1;
  for (int index = cluster; index < p.tiles; index += clusters) {
    const Tile tile = locate(p, index, rank_m, rank_n);
    const int row = tile.m * kRows, column = tile.n * (kGated ? kColumns / 2 : kColumns);
    const int second = column + (kGated ? p.columns : kColumns / 2);
    for (int step = 0; step < p.steps; ++step) {
      const uint32_t a = stages + stage * kStage, b = a + kA, ready = full + 8 * stage;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(ready, kStage);
      if (p.cn == 1) load_2d(a, &p.x, ready, step * kDepth, row);
      else load_2d_multicast(a + rank_n * (kA / 2), &p.x, ready, mask_a, step * kDepth, row + rank_n * (kRows / 2));
      if (p.cm == 1) {
        load_2d(b, &p.weight, ready, step * kDepth, column);
        load_2d(b + kB / 2, &p.weight, ready, step * kDepth, second);
      } else {
        load_2d_multicast(b + rank_m * (kB / 2), &p.weight, ready, mask_b, step * kDepth, rank_m ? second : column);
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

// Rounds a warpgroup's sums and biases into shared memory.
template <bool kHalf> __device__ __forceinline__ void stage_tile(const float (&acc)[kColumns], const uint32_t (&bias)[kColumns / 8], uint32_t staging, int thread) {
  // Where this lane puts its row of the four 8 x 8 matrices that a warp stores at once.
  const uint32_t to = staging + ((thread >> 5) * 16 + (thread & 15)) * layout::kPitch + (thread >> 4 & 1) * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float2 b = unpack<kHalf>(bias[j + m]);
        const float *v = acc + i * (kColumns / 2) + (j + m) * 4;
        words[m * 2] = pack<kHalf>(v[0] + b.x, v[1] + b.y), words[m * 2 + 1] = pack<kHalf>(v[2] + b.x, v[3] + b.y);
      }
      store_matrices(to + i * 64 * layout::kPitch + j * 16, words);
    }
}

template <bool kHalf> __device__ __forceinline__ uint32_t add(uint32_t x, uint32_t y) {
  const float2 a = unpack<kHalf>(x), b = unpack<kHalf>(y);
  return pack<kHalf>(a.x + b.x, a.y + b.y);
}

// Writes a tile from shared memory, gated, with the residual, or as it is, 16 bytes a thread.
template <bool kGated, bool kHalf, bool kResidual> __device__ __forceinline__ void write_tile(const Product &p, const Tile &tile, uint32_t staging, int thread) {
  constexpr int kParts = (kGated ? kColumns / 2 : kColumns) / 8; // of a row
  const int64_t corner = 2 * (static_cast<int64_t>(tile.m) * kRows * p.columns + tile.n * (kParts * 8));
  char *y = static_cast<char *>(p.y) + corner;
  const char *residual = static_cast<const char *>(p.residual) + corner;
  const int rows = p.rows - tile.m * kRows, columns = p.columns - tile.n * (kParts * 8);
#pragma unroll(kGated ? 1 : kResidual ? 5 : 4)
  for (int i = 0; i < kRows * kParts / 128; ++i) {
    const int part = i * 128 + thread, row = part / kParts, column = part % kParts * 8;
    const uint32_t from = staging + row * layout::kPitch + column * 2;
    uint4 words = load_shared(from);
    if constexpr (kGated) {
      const uint4 gates = load_shared(from + kColumns);
      words = make_uint4(gate<kHalf>(words.x, gates.x), gate<kHalf>(words.y, gates.y), gate<kHalf>(words.z, gates.z), gate<kHalf>(words.w, gates.w));
    }
    const bool inside = row < rows && column < columns;
    const int64_t at = 2 * (static_cast<int64_t>(row) * p.columns + column);
    if constexpr (kResidual) {
      const uint4 other = inside ? __ldg(reinterpret_cast<const uint4 *>(residual + at)) : make_uint4(0, 0, 0, 0);
      words = make_uint4(add<kHalf>(words.x, other.x), add<kHalf>(words.y, other.y), add<kHalf>(words.z, other.z), add<kHalf>(words.w, other.w));
    }
    if (inside) *reinterpret_cast<uint4 *>(y + at) = words;
  }
}

#endif

// Grid: clusters of cm * cn blocks; each walks over tiles, its warpgroups in turns.
template <bool kGated, bool kHalf> __global__ void __launch_bounds__(kThreads, 1) product(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace layout;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t stages = shared_address(memory), staging = stages + kStaging, full = stages + kFull, empty = stages + kEmpty;
  const int blocks = p.cm * p.cn, rank = blocks > 1 ? cluster_rank() : 0, rank_n = rank % p.cn, rank_m = rank / p.cn;
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  if (threadIdx.x == 0) {
    if (stages & 1023) __trap(); // the swizzle counts from multiples of 1024
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, p.cm + p.cn - 1); // a consumer of every block that the stage's loads come from or go to
    }
    barrier_init_fence();
    prefetch_map(&p.x);
    prefetch_map(&p.weight);
  }
  wait_for_previous_kernel(); // nothing before this line touches its results
  if (blocks > 1) cluster_sync();
  else __syncthreads();

  if (threadIdx.x < 128) {
    registers_decrease<24>();
    if (threadIdx.x == 0) produce<kGated>(p, stages, full, empty, rank_m, rank_n, cluster, clusters);
    __syncwarp();
  } else {
    registers_increase<240>();
    const int group = (threadIdx.x >> 7) - 1, thread = threadIdx.x & 127;
    // Which thread tells which block that a stage has been read.
    const bool tells = thread < blocks && (thread % p.cn == rank_n || thread / p.cn == rank_m);
    float acc[kColumns];
    uint32_t position = 0; // in the sequence of stages
    int turn = 0;
    for (int index = cluster; index < p.tiles; index += clusters, ++turn, position += p.steps) {
      if ((turn & 1) != group) continue;
      const bool first = turn == 0, last = index + clusters >= p.tiles;
      const Tile tile = locate(p, index, rank_m, rank_n);
      uint32_t bias[kColumns / 8]; // two columns each
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const bool second = kGated && j >= kColumns / 16;
        const int column = tile.n * (kGated ? kColumns / 2 : kColumns) + (second ? j - kColumns / 16 : j) * 8 + (thread & 3) * 2;
        bias[j] = 0;
        if (p.bias && column < p.columns) bias[j] = __ldg(reinterpret_cast<const uint32_t *>(static_cast<const uint16_t *>(p.bias) + column + (second ? p.columns : 0)));
      }
      int stage = position % kStages, before = 0;
      uint32_t parity = position / kStages & 1;
      if (!first) named_barrier(kMayMultiply + group, 256); // the other's loads have arrived, and its products are on their way
      for (int step = 0; step < p.steps; ++step) {
        const uint32_t a = stages + stage * kStage, b = a + kA;
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          const uint64_t bd = descriptor(b + k * 32, 16, 1024, kSwizzle128);
#pragma unroll
          for (int i = 0; i < 2; ++i) Wgmma<kColumns, kHalf, false>::run(acc + i * (kColumns / 2), descriptor(a + i * 64 * 128 + k * 32, 16, 1024, kSwizzle128), bd, step | k);
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * before, thread) : barrier_arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      if (!last) named_arrive(kMayMultiply + 1 - group, 256);
      wgmma_wait<0>();
      if (tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * before, thread) : barrier_arrive(empty + 8 * before);
      if (!first) named_barrier(kMayStage + group, 256);
      stage_tile<kHalf>(acc, bias, staging, thread);
      named_barrier(kStaged + group, 128);
      if constexpr (kGated) write_tile<true, kHalf, false>(p, tile, staging, thread);
      else if (p.residual) write_tile<false, kHalf, true>(p, tile, staging, thread);
      else write_tile<false, kHalf, false>(p, tile, staging, thread);
      if (!last) named_arrive(kMayStage + 1 - group, 256);
    }
  }
  if (blocks > 1) cluster_sync(); // no block leaves while another may still write to its shared memory
#endif
}

template <bool kGated, bool kHalf> int run(Product &p, const LcmLinear *c, int multiprocessors, cudaStream_t stream) {
  const int64_t sizes[2] = {c->inner, c->rows}, weight_sizes[2] = {c->inner, kGated ? 2ll * c->columns : c->columns}, strides[1] = {c->inner};
  const int box[2] = {kDepth, kRows / p.cn}, weight_box[2] = {kDepth, kColumns / 2};
  if (!hopper_gemm::encode(&p.x, kHalf, 2, c->x, sizes, strides, box) || !hopper_gemm::encode(&p.weight, kHalf, 2, c->weight, weight_sizes, strides, weight_box)) return -1;
  const int tile = (kGated ? kColumns / 2 : kColumns) * p.cn;
  p.bias = c->bias, p.residual = c->residual, p.y = c->y, p.rows = c->rows, p.columns = c->columns, p.steps = (c->inner + kDepth - 1) / kDepth;
  p.tiles_m = (c->rows + kRows * p.cm - 1) / (kRows * p.cm), p.tiles_n = (c->columns + tile - 1) / tile, p.tiles = p.tiles_m * p.tiles_n;
  auto kernel = product<kGated, kHalf>;
  static bool ready[64];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return -1;
  if (!__atomic_load_n(&ready[device], __ATOMIC_ACQUIRE)) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout::kBytes) != cudaSuccess) return cudaGetLastError();
    __atomic_store_n(&ready[device], true, __ATOMIC_RELEASE);
  }
  const int blocks = p.cm * p.cn;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(min(p.tiles, multiprocessors / blocks) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = layout::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1; // its prologue may overlap the end of the kernel before
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = blocks, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes, config.numAttrs = blocks > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, p);
  return cudaGetLastError();
}

} // namespace

extern "C" int lcm_linear_hopper(const LcmLinear *c, cudaStream_t stream) {
  using hopper_gemm::aligned;
  if (c->dtype != 1 && c->dtype != 2) return -1;
  if (c->rows < 1 || c->inner < 8 || c->columns < 8 || c->inner % 8 || c->columns % 8) return -1;
  if (!aligned(c->x) || !aligned(c->weight) || !aligned(c->y) || !aligned(c->residual) || (c->gated && c->residual) || reinterpret_cast<uintptr_t>(c->bias) & 3) return -1;
  const int multiprocessors = hopper_gemm::hopper_multiprocessors();
  if (!multiprocessors) return -1;
  Product p = {};
  p.cm = 1, p.cn = 1;
  if (c->gated) return c->dtype == 2 ? run<true, true>(p, c, multiprocessors, stream) : run<true, false>(p, c, multiprocessors, stream);
  return c->dtype == 2 ? run<false, true>(p, c, multiprocessors, stream) : run<false, false>(p, c, multiprocessors, stream);
}
