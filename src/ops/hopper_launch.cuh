#pragma once
// Host side of hopper_gemm.cuh: tensor maps, the choice of tile and cluster, and the launch.
#include "hopper_gemm.cuh"
#include <cudaTypedefs.h>

namespace hopper_gemm {

constexpr int kMaxDevices = 64;

// The driver's encoder of tensor maps, looked up once (twice if two threads come first, to the same effect).
inline PFN_cuTensorMapEncodeTiled_v12000 encoder() {
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

// Multiprocessors of the current device if it is a Hopper, else 0.
inline int hopper_multiprocessors() {
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

// A tensor map over 16-bit numbers: sizes and box from the innermost dimension on, strides in numbers for all but the innermost.
inline bool encode(CUtensorMap *map, bool half, int rank, const void *base, const int64_t *sizes, const int64_t *strides, const int *box) {
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

// How a problem is cut: pixels per tile and the shape of the cluster (see gemm).
struct Plan {
  int rows, columns, cm, cn, split;
};

#ifdef LCM_TUNE
extern "C" { int lcm_tune_rows, lcm_tune_columns, lcm_tune_cm, lcm_tune_cn, lcm_tune_split, lcm_tune_query; }
#endif

// Boxes of 2^log_w x 2^log_h pixels and as many samples as fill `pixels`: the shape that covers the images with the fewest.
inline int choose_box(int pixels_log, int samples, int height, int width, int *log_w, int *log_h) {
  int64_t best = INT64_MAX;
  for (int w = 0; w <= pixels_log; ++w)
    for (int h = 0; w + h <= pixels_log; ++h) {
      int n = pixels_log - w - h;
      int64_t boxes = ((width + (1ll << w) - 1) >> w) * ((height + (1ll << h) - 1) >> h) * ((samples + (1ll << n) - 1) >> n);
      if (boxes <= best) best = boxes, *log_w = w, *log_h = h; // of equals the widest
    }
  return static_cast<int>(best);
}

// The plan with the least estimated time, in units of a 64-deep step of a 256 x 160 tile (about 0.83 us).
inline Plan choose_plan(int64_t boxes, int columns, int steps, bool transposed, int multiprocessors) {
#ifdef LCM_TUNE
  if (lcm_tune_rows) return {lcm_tune_rows, lcm_tune_columns, lcm_tune_cm, lcm_tune_cn, lcm_tune_split};
#endif
  struct Candidate {
    int rows, columns;
    double step, split_step; // of a tile, with and without sharing of loads
  };
  static const Candidate forward[3] = {{256, 160, 1.0, 1.06}, {128, 160, 0.57, 0.65}, {128, 256, 0.82, 0.87}}, gradient[2] = {{128, 320, 1.0, 1.06}, {128, 256, 0.82, 0.87}};
  Plan best{};
  double best_time = 1e30;
  for (int i = 0; i < (transposed ? 2 : 3); ++i)
    for (int split = 1; split <= 3; ++split) {
      const Candidate &c = transposed ? gradient[i] : forward[i];
      if (split > 1 && steps < 12 * split) continue;
      const int64_t tiles = (boxes * 128 + c.rows - 1) / c.rows * ((columns + c.columns - 1) / c.columns) * split;
      const int capacity = split == 3 ? multiprocessors * 10 / 11 : multiprocessors;
      const int64_t waves = (tiles + capacity - 1) / capacity;
      const double time = waves * (static_cast<double>(steps) / split * (split > 1 ? c.split_step : c.step) + (split > 1 ? 8 : 4));
      if (time < best_time) best_time = time, best = Plan{c.rows, c.columns, 1, 1, split};
    }
  if (best.split == 1) ((columns + best.columns - 1) / best.columns % 2 == 0 && !transposed ? best.cn : best.cm) = 2;
  return best;
}

// Cuts the output of `phases` phases into boxes, tiles and clusters; `box` is that of A's tensor maps.
inline Plan cut(Problem &p, int phases, bool transposed, int multiprocessors, int (&box)[4]) {
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
  p.tiles_m = (boxes + 2 * p.cm - 1) / (2 * p.cm);
  p.tiles_n = (p.columns + plan.columns * p.cn - 1) / (plan.columns * p.cn);
  p.tiles = p.tiles_m * p.tiles_n * phases;
  box[0] = kDepth, box[1] = 1 << p.log_w, box[2] = 1 << p.log_h, box[3] = 1 << (box_log - p.log_w - p.log_h);
  return plan;
}

// The tensor map of weights (output channels, taps, input channels); `transposed`: they are read for the gradient of the input.
inline bool encode_weights(CUtensorMap *map, const Plan &plan, bool half, bool transposed, const void *weight, int64_t input, int64_t taps, int64_t output) {
  const int64_t sizes[3] = {input, taps, output}, strides[2] = {input, input * taps};
  const int forward_box[3] = {kDepth, 1, plan.columns / plan.cm}, transposed_box[3] = {kBlock, 1, kDepth / plan.cm};
  return encode(map, half, 3, weight, sizes, strides, transposed ? transposed_box : forward_box);
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
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = blocks > 1;
#ifdef LCM_TUNE
  if (lcm_tune_query) { int n = 0; cudaOccupancyMaxActiveClusters(&n, kernel, &config); lcm_tune_query = n; }
#endif
  cudaLaunchKernelEx(&config, kernel, problem);
  return cudaGetLastError();
}
template <bool kTransposed, bool kHalf> int launch(const Problem &problem, const Plan &plan, int multiprocessors, cudaStream_t stream) {
  if constexpr (kTransposed) {
    if (plan.columns == 320) return launch<128, 320, true, kHalf>(problem, multiprocessors, stream);
    return launch<128, 256, true, kHalf>(problem, multiprocessors, stream);
  } else {
    if (plan.rows == 256) return launch<256, 160, false, kHalf>(problem, multiprocessors, stream);
    if (plan.columns == 160) return launch<128, 160, false, kHalf>(problem, multiprocessors, stream);
    return launch<128, 256, false, kHalf>(problem, multiprocessors, stream);
  }
}
inline int launch(const Problem &problem, const Plan &plan, bool transposed, bool half, int multiprocessors, cudaStream_t stream) {
  if (transposed) return half ? launch<true, true>(problem, plan, multiprocessors, stream) : launch<true, false>(problem, plan, multiprocessors, stream);
  return half ? launch<false, true>(problem, plan, multiprocessors, stream) : launch<false, false>(problem, plan, multiprocessors, stream);
}

inline bool aligned(const void *pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }

} // namespace hopper_gemm
