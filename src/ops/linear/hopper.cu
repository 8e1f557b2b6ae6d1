// Linear layers on Hopper: y = x W^T + b (+ residual).
//
// A block makes tiles of 128 rows x 160 columns. Two warpgroups take turns, each with a tile of its own: while one finishes and
// writes its tile, the other has the tensor cores. A producer fills the stages they read, in the order of the tiles. Copies to
// several blocks of a cluster at once (multicast) were no faster.
//
// A tile is finished in two steps: the sums and biases are rounded and put into shared memory by straight-line code (an
// array of registers can only be indexed so), which is kept short, for what it costs is the fetching of instructions; then a
// loop reads whole 16 bytes of it, adds the residual, and writes rows.
#include "hopper_linear.cuh"

using namespace hopper_linear;

namespace {

constexpr int kColumns = 160;

namespace layout { // of shared memory
constexpr int kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2, kStage = kA + kB, kStages = 5;
constexpr int kPitch = kColumns * 2 + 16; // bytes from row to row of a finished tile: an odd number of 16s, so 8 rows lie in different banks
constexpr int kStaging = kStages * kStage, kFull = kStaging + kRows * kPitch, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
static_assert(kBytes <= 227 * 1024, "");
} // namespace layout

// Numbers of the barriers among warps; each has one for either warpgroup, from these on.
enum Barrier { kMayMultiply = 1, kMayStage = 3, kStaged = 5 };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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

// Writes a tile from shared memory, with the residual or as it is, 16 bytes a thread.
template <bool kHalf, bool kResidual> __device__ __forceinline__ void write_tile(const Product &p, const Tile &tile, uint32_t staging, int thread) {
  constexpr int kParts = kColumns / 8; // of a row
  const int64_t corner = 2 * (static_cast<int64_t>(tile.m) * kRows * p.columns + tile.n * (kParts * 8));
  char *y = static_cast<char *>(p.y) + corner;
  const char *residual = static_cast<const char *>(p.residual) + corner;
  const int rows = p.rows - tile.m * kRows, columns = p.columns - tile.n * (kParts * 8);
#pragma unroll(kResidual ? 5 : 4)
  for (int i = 0; i < kRows * kParts / 128; ++i) {
    const int part = i * 128 + thread, row = part / kParts, column = part % kParts * 8;
    const uint32_t from = staging + row * layout::kPitch + column * 2;
    uint4 words = load_shared(from);
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

// Grid: as many blocks as run at a time; each walks over tiles, its warpgroups in turns.
template <bool kHalf> __global__ void __launch_bounds__(kThreads, 1) product(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace layout;
  extern __shared__ __align__(1024) char memory[]; // the swizzle counts from multiples of 1024
  const uint32_t stages = shared_address(memory), staging = stages + kStaging, full = stages + kFull, empty = stages + kEmpty;
  start_ring<kStages>(p, full, empty, 1);
  if (threadIdx.x < 128) {
    registers_decrease<24>();
    if (threadIdx.x == 0) produce<kStages, kColumns / 2>(p, stages, full, empty, kColumns, kColumns / 2);
  } else {
    registers_increase<240>();
    const int group = (threadIdx.x >> 7) - 1, thread = threadIdx.x & 127;
    float acc[kColumns];
    uint32_t position = 0; // in the sequence of stages
    int turn = 0;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, ++turn, position += p.steps) {
      if ((turn & 1) != group) continue;
      const bool first = turn == 0, last = index + gridDim.x >= p.tiles;
      const Tile tile = locate(p, index);
      uint32_t bias[kColumns / 8]; // two columns each
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const int column = tile.n * kColumns + j * 8 + (thread & 3) * 2;
        bias[j] = 0;
        if (p.bias && column < p.columns) bias[j] = __ldg(reinterpret_cast<const uint32_t *>(static_cast<const uint16_t *>(p.bias) + column));
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
          if (thread == 0) barrier_arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      if (!last) named_arrive(kMayMultiply + 1 - group, 256);
      wgmma_wait<0>();
      if (thread == 0) barrier_arrive(empty + 8 * before);
      if (!first) named_barrier(kMayStage + group, 256);
      stage_tile<kHalf>(acc, bias, staging, thread);
      named_barrier(kStaged + group, 128);
      if (p.residual) write_tile<kHalf, true>(p, tile, staging, thread);
      else write_tile<kHalf, false>(p, tile, staging, thread);
      if (!last) named_arrive(kMayStage + 1 - group, 256);
    }
  }
#endif
}

template <bool kHalf> int run(const LcmLinear *c, int multiprocessors, cudaStream_t stream) {
  static bool ready[64];
  return launch<kHalf>(product<kHalf>, c, kColumns, kColumns / 2, layout::kBytes, ready, multiprocessors, stream);
}

} // namespace

extern "C" int lcm_linear_hopper(const LcmLinear *c, cudaStream_t stream) {
  using hopper_gemm::aligned;
  if (c->dtype != 1 && c->dtype != 2) return -1;
  if (c->rows < 1 || c->inner < 8 || c->columns < 8 || c->inner % 8 || c->columns % 8) return -1;
  if (!aligned(c->x) || !aligned(c->weight) || !aligned(c->bias) || !aligned(c->residual) || !aligned(c->y) || (c->gated && c->residual)) return -1;
  const int multiprocessors = hopper_gemm::hopper_multiprocessors();
  if (!multiprocessors) return -1;
  if (c->gated) return launch_gated(c, multiprocessors, stream);
  return c->dtype == 2 ? run<true>(c, multiprocessors, stream) : run<false>(c, multiprocessors, stream);
}
