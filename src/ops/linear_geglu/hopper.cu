// A linear layer and the gated GELU behind it as one kernel on Hopper: y = (x V^T + v) * gelu(x G^T + g), where V and G are
// the first and the second half of the weight's rows. The projection itself, twice as wide as y, is never written.
//
// A block makes tiles of 128 rows x 80 columns of y: the products' B operand is 80 rows of V and the same 80 of G, so that
// a thread holds value and gate of the same numbers. Two warpgroups take turns, each with a tile of its own: while one
// computes the GELU and writes, the other has the tensor cores. The blocks of a cluster share loads by multicast: `cm`
// blocks above each other the weights, `cn` blocks side by side the rows of x.
#include "linear_geglu.h"

#include "../activation/activation.cuh"
#include "../hopper_gemm.h"
#include "../hopper.cuh"

using namespace hopper;

namespace {

constexpr int kRows = 128, kDepth = 64;
constexpr int kThreads = 384; // producer warpgroup and two consumers
constexpr int kGroup = 8;     // clusters of rows that are walked together with all columns, for the second-level cache

struct Product {
  CUtensorMap x, weight, y;
  const void *bias;
  int columns, steps; // of y; of 64 numbers of K
  int tiles_m, tiles_n, tiles, cm, cn;
};

template <int kColumns> struct Layout { // of shared memory
  static constexpr int kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2, kStage = kA + kB;
  static constexpr int kOut = kRows * kColumns; // bytes: half the columns, two bytes each
  static constexpr int kStages = (227 * 1024 - 2 * kOut - 128) / kStage;
  static constexpr int kStaging = kStages * kStage, kFull = kStaging + 2 * kOut, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void load_2d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void load_2d_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier, uint16_t blocks, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
               "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void store_2d(const CUtensorMap *map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
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

// The producer: one thread that keeps the stages filled.
template <int kColumns, bool kGated>
__device__ __forceinline__ void produce(const Product &p, uint32_t stages, uint32_t full, uint32_t empty, int rank_m, int rank_n, int cluster, int clusters) {
  using L = Layout<kColumns>;
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
      const uint32_t a = stages + stage * L::kStage, b = a + L::kA, ready = full + 8 * stage;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(ready, L::kStage);
      if (p.cn == 1) load_2d(a, &p.x, ready, step * kDepth, row);
      else load_2d_multicast(a + rank_n * (L::kA / 2), &p.x, ready, mask_a, step * kDepth, row + rank_n * (kRows / 2));
      if (p.cm == 1) {
        load_2d(b, &p.weight, ready, step * kDepth, column);
        load_2d(b + L::kB / 2, &p.weight, ready, step * kDepth, second);
      } else {
        load_2d_multicast(b + rank_m * (L::kB / 2), &p.weight, ready, mask_b, step * kDepth, rank_m ? second : column);
      }
      if (++stage == L::kStages) stage = 0, parity ^= 1;
    }
  }
}

#endif

// Grid: clusters of cm * cn blocks; each walks over tiles, its warpgroups in turns.
template <int kColumns, bool kGated, bool kHalf> __global__ void __launch_bounds__(kThreads, 1) product(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kColumns>;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t stages = shared_address(memory), full = stages + L::kFull, empty = stages + L::kEmpty;
  const int blocks = p.cm * p.cn, rank = blocks > 1 ? cluster_rank() : 0, rank_n = rank % p.cn, rank_m = rank / p.cn;
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  if (threadIdx.x == 0) {
    if (stages & 1023) __trap(); // the swizzle counts from multiples of 1024
    for (int i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, p.cm + p.cn - 1); // a consumer of every block that the stage's loads come from or go to
    }
    barrier_init_fence();
    prefetch_map(&p.x);
    prefetch_map(&p.weight);
    prefetch_map(&p.y);
  }
  wait_for_previous_kernel(); // nothing before this line touches its results
  if (blocks > 1) cluster_sync();
  else __syncthreads();

  if (threadIdx.x < 128) {
    registers_decrease<24>();
    if (threadIdx.x == 0) produce<kColumns, kGated>(p, stages, full, empty, rank_m, rank_n, cluster, clusters);
    __syncwarp();
  } else {
    registers_increase<240>();
    constexpr int kEights = kColumns / 16; // of columns, in half a tile
    const int group = (threadIdx.x >> 7) - 1, thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const uint32_t staging = stages + L::kStaging + group * L::kOut;
    // Which thread tells which block that a stage has been read.
    const bool tells = thread < blocks && (thread % p.cn == rank_n || thread / p.cn == rank_m);
    // Where this lane puts its row of the four 8 x 8 matrices that a warp stores at once.
    const uint32_t to = staging + (warp * 16 + (lane & 15)) * kColumns + (lane >> 4) * 16;
    float acc[kColumns];
    uint32_t position = 0; // in the sequence of stages
    int turn = 0;
    for (int index = cluster; index < p.tiles; index += clusters, ++turn, position += p.steps) {
      if ((turn & 1) != group) continue;
      const Tile tile = locate(p, index, rank_m, rank_n);
      const int column = tile.n * (kGated ? kColumns / 2 : kColumns);
      uint32_t bias[2 * kEights]; // two columns each
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
          const int c = column + (kGated ? 0 : half * (kColumns / 2)) + j * 8 + (lane & 3) * 2;
          bias[half * kEights + j] = 0;
          if (p.bias && c < p.columns) bias[half * kEights + j] = __ldg(reinterpret_cast<const uint32_t *>(static_cast<const uint16_t *>(p.bias) + c + (kGated && half ? p.columns : 0)));
        }
      int stage = position % L::kStages, last = 0;
      uint32_t parity = position / L::kStages & 1;
      if (turn > 0) named_barrier(1 + group, 256); // the other's loads have arrived, and its products are on their way
      for (int step = 0; step < p.steps; ++step) {
        const uint32_t a = stages + stage * L::kStage, b = a + L::kA;
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
          if (tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * last, thread) : barrier_arrive(empty + 8 * last);
        }
        last = stage;
        if (++stage == L::kStages) stage = 0, parity ^= 1;
      }
      if (index + clusters < p.tiles) named_arrive(2 - group, 256);
      wgmma_wait<0>();
      if (tells) blocks > 1 ? barrier_arrive_cluster(empty + 8 * last, thread) : barrier_arrive(empty + 8 * last);
#pragma unroll
      for (int half = 0; half < (kGated ? 1 : 2); ++half) {
        if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); // the staging memory is free
        named_barrier(3 + group, 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float *values = acc + i * (kColumns / 2) + half * kEights * 4, *gates = acc + i * (kColumns / 2) + kEights * 4;
#pragma unroll
          for (int j = 0; j < kEights; j += 2) {
            uint32_t words[4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              const float2 b = unpack<kHalf>(bias[half * kEights + j + m]), c = unpack<kHalf>(bias[kEights + j + m]);
              float v[4];
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                v[r] = values[(j + m) * 4 + r] + (r & 1 ? b.y : b.x);
                if constexpr (kGated) {
                  float g = gates[(j + m) * 4 + r] + (r & 1 ? c.y : c.x);
                  v[r] *= g * lcm::normal_distribution(g);
                }
              }
              words[m * 2] = pack<kHalf>(v[0], v[1]), words[m * 2 + 1] = pack<kHalf>(v[2], v[3]);
            }
            store_matrices(to + i * 64 * kColumns + j * 16, words[0], words[1], words[2], words[3]);
          }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        named_barrier(3 + group, 128);
        if (thread == 0) {
          store_2d(&p.y, staging, column + half * (kColumns / 2), tile.m * kRows);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (blocks > 1) cluster_sync(); // no block leaves while another may still write to its shared memory
#endif
}

template <int kColumns, bool kGated, bool kHalf> int run(Product &p, const LcmLinearGeglu *c, int multiprocessors, cudaStream_t stream) {
  using L = Layout<kColumns>;
  const int64_t inner = c->inner, width = kGated ? 2ll * c->columns : c->columns;
  const int64_t x_sizes[2] = {inner, c->rows}, weight_sizes[2] = {inner, width}, strides[1] = {inner};
  const int x_box[2] = {kDepth, kRows / p.cn}, weight_box[2] = {kDepth, kColumns / 2};
  if (!hopper_gemm::encode(&p.x, kHalf, 2, c->x, x_sizes, strides, x_box)) return -1;
  if (!hopper_gemm::encode(&p.weight, kHalf, 2, c->weight, weight_sizes, strides, weight_box)) return -1;
  const int64_t y_sizes[2] = {c->columns, c->rows}, y_strides[1] = {c->columns};
  const int y_box[2] = {kColumns / 2, kRows};
  if (!hopper_gemm::encode(&p.y, kHalf, 2, c->y, y_sizes, y_strides, y_box, false)) return -1;
  const int tile = (kGated ? kColumns / 2 : kColumns) * p.cn;
  p.bias = c->bias, p.columns = c->columns, p.steps = (c->inner + kDepth - 1) / kDepth;
  p.tiles_m = (c->rows + kRows * p.cm - 1) / (kRows * p.cm), p.tiles_n = (c->columns + tile - 1) / tile, p.tiles = p.tiles_m * p.tiles_n;
  auto kernel = product<kColumns, kGated, kHalf>;
  static bool ready[64];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return -1;
  if (!__atomic_load_n(&ready[device], __ATOMIC_ACQUIRE)) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) return cudaGetLastError();
    __atomic_store_n(&ready[device], true, __ATOMIC_RELEASE);
  }
  const int blocks = p.cm * p.cn;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(min(p.tiles, multiprocessors / blocks) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = blocks, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1; // its prologue may overlap the end of the kernel before
  config.attrs = attributes, config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, p);
  return cudaGetLastError();
}

} // namespace

extern "C" int lcm_linear_geglu_hopper(const LcmLinearGeglu *c, cudaStream_t stream) {
  using hopper_gemm::aligned;
  if (c->dtype != 1 && c->dtype != 2) return -1;
  if (c->rows < 1 || c->inner < 8 || c->columns < 8 || c->inner % 8 || c->columns % 8) return -1;
  if (!aligned(c->x) || !aligned(c->weight) || !aligned(c->y) || reinterpret_cast<uintptr_t>(c->bias) & 3) return -1;
  const int multiprocessors = hopper_gemm::hopper_multiprocessors();
  if (!multiprocessors) return -1;
  Product p = {};
  p.cm = 2, p.cn = 1;
  return c->dtype == 2 ? run<160, true, true>(p, c, multiprocessors, stream) : run<160, true, false>(p, c, multiprocessors, stream);
}
