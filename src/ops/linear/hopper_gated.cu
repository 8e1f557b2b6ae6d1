// A linear layer with the gated GELU behind it on Hopper: y = (x V^T + v) * gelu(x G^T + g), where V and G are the first and the
// second half of the weight's rows. The projection, twice as wide as y, is never in memory.
//
// A block makes tiles of 128 rows x 128 columns of y: two warpgroups share the products with 128 rows of V and the same 128 of G,
// 64 rows of x each. Tiles so wide because shared memory is the limit: what the tensor cores read and the copies write together
// comes to 127 bytes a cycle of its 128, where tiles of 128 x 160 would take 147. The sums are rounded into shared memory, where
// the three warps beside the producer's gate and write them, while the next tile's products run.
#include "hopper_linear.cuh"

#include "../activation/activation.cuh"

using namespace hopper_linear;

namespace {

constexpr int kWidth = 128, kColumns = 2 * kWidth; // of y; of the product
constexpr int kWriters = 96, kMeeting = 256 + kWriters; // threads that write; those and the consumers

namespace layout { // of shared memory
constexpr int kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2, kStage = kA + kB, kStages = 3;
constexpr int kPitch = kColumns * 2 + 16; // bytes from row to row of a finished tile: an odd number of 16s, so 8 rows lie in different banks
constexpr int kStaging = kStages * kStage, kFull = kStaging + kRows * kPitch, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
static_assert(kBytes <= 227 * 1024, "");
} // namespace layout

enum Barrier { kStaged = 1, kMayStage = 2 }; // a tile's sums are in shared memory; it may be overwritten

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A bias of 8 columns, or zeros.
template <bool kHalf> __device__ __forceinline__ void load_bias(float (&to)[8], const void *bias, int64_t column, bool present) {
  const uint4 words = present ? __ldg(reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(bias) + column)) : make_uint4(0, 0, 0, 0);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<kHalf>(word[i]);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

// A writer: keeps to 8 columns, and takes every 6th row.
template <bool kHalf> __device__ __forceinline__ void write_tiles(const Product &p, uint32_t staging, int thread) {
  constexpr int kParts = kWidth / 8, kStride = kWriters / kParts;
  const int part = thread % kParts, first = thread / kParts;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = locate(p, index);
    const int column = tile.n * kWidth + part * 8;
    float v[8], g[8];
    load_bias<kHalf>(v, p.bias, column, p.bias && column < p.columns);
    load_bias<kHalf>(g, p.bias, static_cast<int64_t>(p.columns) + column, p.bias && column < p.columns);
    named_barrier(kStaged, kMeeting);
#pragma unroll 2 // one row at a time leaves a warp waiting for its own results
    for (int i = first; i < kRows; i += kStride) {
      const uint32_t from = staging + i * layout::kPitch + part * 16;
      const uint4 values = load_shared(from), gates = load_shared(from + kWidth * 2);
      const uint32_t value[4] = {values.x, values.y, values.z, values.w}, gate[4] = {gates.x, gates.y, gates.z, gates.w};
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 s = unpack<kHalf>(value[k]), t = unpack<kHalf>(gate[k]);
        const float x = t.x + g[2 * k], y = t.y + g[2 * k + 1];
        words[k] = pack<kHalf>((s.x + v[2 * k]) * (x * lcm::normal_distribution(x)), (s.y + v[2 * k + 1]) * (y * lcm::normal_distribution(y)));
      }
      const int row = tile.m * kRows + i;
      if (row < p.rows && column < p.columns)
        *reinterpret_cast<uint4 *>(static_cast<char *>(p.y) + 2 * (static_cast<int64_t>(row) * p.columns + column)) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (index + gridDim.x < p.tiles) named_arrive(kMayStage, kMeeting);
  }
}

#endif

// Grid: as many blocks as run at a time; each walks over tiles.
template <bool kHalf> __global__ void __launch_bounds__(kThreads, 1) gated_product(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace layout;
  extern __shared__ __align__(1024) char memory[]; // the swizzle counts from multiples of 1024
  const uint32_t stages = shared_address(memory), staging = stages + kStaging, full = stages + kFull, empty = stages + kEmpty;
  start_ring<kStages>(p, full, empty, 2);
  const int group = (threadIdx.x >> 7) - 1, thread = threadIdx.x & 127;
  if (group < 0) {
    registers_decrease<104>();
    if (thread == 0) produce<kStages, kWidth>(p, stages, full, empty, kWidth, p.columns);
    else if (thread >= 32) write_tiles<kHalf>(p, staging, thread - 32);
  } else {
    registers_increase<200>();
    // Where this lane puts its row of the four 8 x 8 matrices that a warp stores at once.
    const uint32_t to = staging + (group * 64 + (thread >> 5) * 16 + (thread & 15)) * kPitch + (thread >> 4 & 1) * 16;
    float acc[kColumns / 2];
    int stage = 0;
    uint32_t parity = 0;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      int before = 0;
      for (int step = 0; step < p.steps; ++step) {
        const uint32_t a = stages + stage * kStage + group * (kA / 2), b = stages + stage * kStage + kA;
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k)
          Wgmma<kColumns, kHalf, false>::run(acc, descriptor(a + k * 32, 16, 1024, kSwizzle128), descriptor(b + k * 32, 16, 1024, kSwizzle128), step | k);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (thread == 0) barrier_arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      if (thread == 0) barrier_arrive(empty + 8 * before);
      if (index != blockIdx.x) named_barrier(kMayStage, kMeeting);
#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 2) {
        const float *v = acc + j * 4;
        const uint32_t words[4] = {pack<kHalf>(v[0], v[1]), pack<kHalf>(v[2], v[3]), pack<kHalf>(v[4], v[5]), pack<kHalf>(v[6], v[7])};
        store_matrices(to + j * 16, words);
      }
      named_arrive(kStaged, kMeeting);
    }
  }
#endif
}

template <bool kHalf> int run(const LcmLinear *c, int multiprocessors, cudaStream_t stream) {
  static bool ready[64];
  return launch<kHalf>(gated_product<kHalf>, c, kWidth, kWidth, layout::kBytes, ready, multiprocessors, stream);
}

} // namespace

int hopper_linear::launch_gated(const LcmLinear *c, int multiprocessors, cudaStream_t stream) {
  return c->dtype == 2 ? run<true>(c, multiprocessors, stream) : run<false>(c, multiprocessors, stream);
}
