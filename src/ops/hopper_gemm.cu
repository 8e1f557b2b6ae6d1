// Host side of hopper_gemm.h: tensor maps, the choice of tile and cluster, and the launch.
#include "hopper_gemm.cuh"
#include <cudaTypedefs.h>

namespace hopper_gemm {
namespace {

constexpr int kMaxDevices = 64;

// The driver's encoder of tensor maps, looked up once (twice if two threads come first, to the same effect).
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 known = nullptr;
  PFN_cuTensorMapEncodeTiled_v12000 function = __atomic_load_n(&known, __ATOMIC_ACQUIRE);
  if (function) return function;
  void *entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) != cudaSuccess || found != cudaDriverEntryPointSuccess)
    return nullptr;
  function = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  __atomic_store_n(&known, function, __ATOMIC_RELEASE);
  return function;
}

// Boxes of 2^log_w x 2^log_h pixels and as many samples as fill `pixels`: the shape that covers the images with the fewest.
int choose_box(int pixels_log, int samples, int height, int width, int *log_w, int *log_h) {
  int64_t best = INT64_MAX;
  for (int w = 0; w <= pixels_log; ++w)
    for (int h = 0; w + h <= pixels_log; ++h) {
      int n = pixels_log - w - h;
      int64_t boxes = ((width + (1ll << w) - 1) >> w) * ((height + (1ll << h) - 1) >> h) * ((samples + (1ll << n) - 1) >> n);
      if (boxes <= best) best = boxes, *log_w = w, *log_h = h; // of equals the widest
    }
  return static_cast<int>(best);
}

// How many clusters of so many blocks run at a time: fewer than the multiprocessors would suggest, as a cluster lies within one of the chip's
// (unequal) parts.
constexpr int kMaxSplit = 6;
int most_clusters(int blocks, int multiprocessors) {
  static int known[kMaxDevices][kMaxSplit + 1];
  int device;
  cudaGetDevice(&device);
  int count = __atomic_load_n(&known[device][blocks], __ATOMIC_RELAXED);
  if (count == 0) {
    using L = Layout<256, 160, false>;
    auto kernel = gemm<256, 160, false, false>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = L::kBytes, config.attrs = &attribute, config.numAttrs = 1;
    if (blocks == 1 || cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess || count == 0) count = multiprocessors / blocks;
    cudaGetLastError();
    __atomic_store_n(&known[device][blocks], count, __ATOMIC_RELAXED);
  }
  return count;
}

// The plan with the least estimated time, from times measured on an H100, in microseconds.
Plan choose_plan(int64_t boxes, int columns, int steps, bool transposed, int multiprocessors) {
  struct Candidate {
    int rows, columns;
    double step, split_step, meeting; // a step of a tile, the same where loads are not shared, and the begin and end of a tile that is split in two
  };
  static const Candidate forward[5] = {{256, 160, 0.82, 0.83, 14}, {128, 160, 0.47, 0.63, 8}, {128, 256, 0.67, 0.85, 12}, {256, 128, 0.68, 0, 0}, {256, 64, 0.4, 0, 0}};
  static const Candidate gradient[3] = {{128, 320, 0.85, 0.86, 14}, {128, 256, 0.68, 0.85, 12}, {256, 64, 0.4, 0, 0}};
  static const int splits[4] = {1, 2, 3, 6}; // clusters of 4 and 5 fit the chip's parts badly: a second wave for what should be one
  Plan best{};
  double best_time = 1e30;
  for (int i = 0; i < (transposed ? 3 : 5); ++i)
    for (int split : splits) {
      const Candidate &c = transposed ? gradient[i] : forward[i];
      if (split > 1 && steps < 8 * split) continue;
      if (c.columns < 160 && (columns > c.columns || split > 1)) continue; // made for so many columns, and for large images
      const int64_t tiles_n = (columns + c.columns - 1) / c.columns, tiles = (boxes * 128 + c.rows - 1) / c.rows * tiles_n * split;
      const int capacity = most_clusters(split, multiprocessors) * split;
      const int64_t waves = (tiles + capacity - 1) / capacity;
      const double whole = waves * (steps * c.step + 1) + 10; // blocks that walk over tiles begin and end once
      const double parts = waves * (static_cast<double>(steps) / split * c.split_step + c.meeting + (split == 2 ? 0 : split == 3 ? 1 : 6));
      const double time = split == 1 ? whole : parts;
      if (time < best_time) {
        best_time = time, best = Plan{c.rows, c.columns, 1, 1, split};
        if (split == 1 && tiles_n % 2 == 0) best.cn = 2;
        else if (split == 1 && !transposed) best.cm = 2;
      }
    }
  return best;
}

template <int kRows, int kColumns, bool kTransposed, bool kHalf> int launch(const Problem &problem, int multiprocessors, cudaStream_t stream) {
  using L = Layout<kRows, kColumns, kTransposed>;
  auto kernel = gemm<kRows, kColumns, kTransposed, kHalf>;
  static bool ready[kMaxDevices];
  int device;
  cudaGetDevice(&device);
  if (!__atomic_load_n(&ready[device], __ATOMIC_ACQUIRE)) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes) != cudaSuccess) return cudaGetLastError();
    __atomic_store_n(&ready[device], true, __ATOMIC_RELEASE);
  }
  const int blocks = problem.cm * problem.cn * problem.split;
  const int clusters = problem.split > 1 ? problem.tiles : min(problem.tiles, multiprocessors / blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = blocks, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
  config.attrs = attributes;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1; // its prologue may overlap the end of the kernel before
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, problem);
  return cudaGetLastError();
}
template <bool kTransposed, bool kHalf> int launch(const Problem &problem, const Plan &plan, int multiprocessors, cudaStream_t stream) {
  if constexpr (kTransposed) {
    if (plan.columns == 320) return launch<128, 320, true, kHalf>(problem, multiprocessors, stream);
    if (plan.columns == 64) return launch<256, 64, true, kHalf>(problem, multiprocessors, stream);
    return launch<128, 256, true, kHalf>(problem, multiprocessors, stream);
  } else {
    if (plan.columns == 64) return launch<256, 64, false, kHalf>(problem, multiprocessors, stream);
    if (plan.columns == 128) return launch<256, 128, false, kHalf>(problem, multiprocessors, stream);
    if (plan.rows == 256) return launch<256, 160, false, kHalf>(problem, multiprocessors, stream);
    if (plan.columns == 160) return launch<128, 160, false, kHalf>(problem, multiprocessors, stream);
    return launch<128, 256, false, kHalf>(problem, multiprocessors, stream);
  }
}
} // namespace

int hopper_multiprocessors() {
  static int known[kMaxDevices];
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
  int count = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (count == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major == 9 && minor == 0) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    else count = -1;
    __atomic_store_n(&known[device], count, __ATOMIC_RELAXED);
  }
  return count < 0 ? 0 : count;
}

bool encode(CUtensorMap *map, bool half, int rank, const void *base, const int64_t *sizes, const int64_t *strides, const int *box) {
  cuuint64_t dims[5], bytes[5];
  cuuint32_t boxes[5], ones[5];
  for (int i = 0; i < rank; ++i) {
    dims[i] = sizes[i], boxes[i] = box[i], ones[i] = 1;
    if (i > 0) bytes[i - 1] = 2 * strides[i - 1];
  }
  auto encode_tiled = encoder();
  return encode_tiled && encode_tiled(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void *>(base), dims, bytes, boxes, ones,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

Plan cut(Problem &p, int phases, bool transposed, int multiprocessors, int (&box)[4]) {
  const int height = (p.height + p.stride - 1) / p.stride, width = (p.width + p.stride - 1) / p.stride;
  int most = 0;
  for (int i = 0; i < phases; ++i) most = max(most, static_cast<int>(p.steps[i]));
  int boxes = choose_box(7, p.samples, height, width, &p.log_w, &p.log_h);
  const Plan plan = choose_plan(static_cast<int64_t>(boxes) * phases, p.columns, most, transposed, multiprocessors);
  const int box_log = plan.rows == 256 ? 7 : 6;
  boxes = choose_box(box_log, p.samples, height, width, &p.log_w, &p.log_h);
  p.boxes_x = (width + (1 << p.log_w) - 1) >> p.log_w;
  p.boxes_y = (height + (1 << p.log_h) - 1) >> p.log_h;
  p.cm = plan.cm, p.cn = plan.cn, p.split = plan.split;
  p.whole_blocks = transposed && p.columns % kBlock == 0;
  p.tiles_m = (boxes + 2 * p.cm - 1) / (2 * p.cm);
  p.tiles_n = (p.columns + plan.columns * p.cn - 1) / (plan.columns * p.cn);
  p.tiles = p.tiles_m * p.tiles_n * phases;
  box[0] = kDepth, box[1] = 1 << p.log_w, box[2] = 1 << p.log_h, box[3] = 1 << (box_log - p.log_w - p.log_h);
  return plan;
}

bool encode_weights(CUtensorMap *map, const Problem &p, const Plan &plan, bool half, bool transposed, const void *weight, int64_t input, int64_t taps,
                    int64_t output) {
  const int64_t sizes[3] = {input, taps, output}, strides[2] = {input, input * taps};
  if (!transposed) {
    const int box[3] = {kDepth, 1, plan.columns / plan.cm};
    return encode(map, half, 3, weight, sizes, strides, box);
  }
  if (p.whole_blocks) {
    const int64_t block_sizes[4] = {kBlock, taps, output, input / kBlock}, block_strides[3] = {input, input * taps, kBlock};
    const int box[4] = {kBlock, 1, kDepth, plan.columns / kBlock};
    return encode(map, half, 4, weight, block_sizes, block_strides, box);
  }
  const int box[3] = {kBlock, 1, kDepth};
  return encode(map, half, 3, weight, sizes, strides, box);
}

int launch(const Problem &problem, const Plan &plan, bool transposed, bool half, int multiprocessors, cudaStream_t stream) {
  if (transposed) return half ? launch<true, true>(problem, plan, multiprocessors, stream) : launch<true, false>(problem, plan, multiprocessors, stream);
  return half ? launch<false, true>(problem, plan, multiprocessors, stream) : launch<false, false>(problem, plan, multiprocessors, stream);
}

} // namespace hopper_gemm
