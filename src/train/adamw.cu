// AdamW over many tensors: as the optimizer on the CPU computes it, in f32, with clipping by the global norm.
//
// A block treats one chunk of one tensor, which it finds by bisection in the list: any number of tensors of any sizes
// is
// one launch. The norm is summed in f64, so that finite f32 gradients have a finite norm; the clipping factor stays on
// the device.
#include "adamw.h"

#include "../ops/elements.cuh"

using namespace lcm;

namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;                        // elements a thread treats at a time: 16 bytes of f32
constexpr int kBatch = 2;                        // such packs a thread has in flight for each of the arrays
constexpr int kPiece = kThreads * kWidth * kBatch;
static_assert(LCM_ADAMW_CHUNK % kPiece == 0, "a chunk is whole pieces");

// The tensor that the chunk belongs to: the last whose first chunk is not above it. Tensors without elements have no
// chunk, and precede one that has.
__device__ __forceinline__ const LcmAdamWTensor &tensor_of(const LcmAdamWTensor *tensors, int count, int64_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (tensors[middle].first_chunk <= chunk) low = middle; else high = middle;
  }
  return tensors[low];
}

__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) value += sums[warp];
  return value;
}

template <class T>
__device__ __forceinline__ double squares(const T *gradient, int64_t length) {
  constexpr int V = 16 / sizeof(T), kLoads = 4;
  double sum = 0.0;
  if (reinterpret_cast<uintptr_t>(gradient) % 16 == 0) {
    int packs = static_cast<int>(length / V);
    for (int pack = threadIdx.x; pack < packs; pack += kThreads * kLoads) {
      float values[kLoads][V];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (pack + k * kThreads < packs) {
          load<V>(gradient + static_cast<int64_t>(pack + k * kThreads) * V, values[k]);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) values[k][i] = 0.0f;
        }
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
#pragma unroll
        for (int i = 0; i < V; ++i) sum = fma(static_cast<double>(values[k][i]), static_cast<double>(values[k][i]), sum);
    }
    gradient += static_cast<int64_t>(packs) * V;
    length -= static_cast<int64_t>(packs) * V;
  }
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    double value = static_cast<float>(gradient[i]);
    sum = fma(value, value, sum);
  }
  return sum;
}

// partial[chunk] = sum of squares of the chunk's gradients. Grid: (chunks).
__global__ void __launch_bounds__(kThreads) partial_norms(const LcmAdamWTensor *tensors, int count, double *partial) {
  int64_t chunk = blockIdx.x;
  const LcmAdamWTensor &tensor = tensor_of(tensors, count, chunk);
  int64_t start = (chunk - tensor.first_chunk) * LCM_ADAMW_CHUNK;
  int64_t length = min(static_cast<int64_t>(LCM_ADAMW_CHUNK), tensor.length - start);
  double sum = 0.0;
  if (tensor.gradient) {
    switch (tensor.gradient_dtype) {
      case 0: sum = squares(static_cast<const float *>(tensor.gradient) + start, length); break;
      case 1: sum = squares(static_cast<const __nv_bfloat16 *>(tensor.gradient) + start, length); break;
      default: sum = squares(static_cast<const __half *>(tensor.gradient) + start, length); break;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[chunk] = sum;
}

// One block.
__global__ void __launch_bounds__(1024)
    clip(const double *partial, int64_t chunks, float gradient_scale, double max_norm, LcmAdamWReport *report) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) sum += partial[chunk];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  double norm = sqrt(sum) * fabs(static_cast<double>(gradient_scale)), factor = max_norm / (norm + 1e-6);
  report->norm = norm;
  report->skipped = !isfinite(norm);
  report->factor = static_cast<float>(gradient_scale * (max_norm > 0.0 && factor < 1.0 ? factor : 1.0));
}

// The update of V elements at `at`.
template <class T, int V>
struct Elements {
  float parameter[V], first[V], second[V], gradient[V], average[V];

  __device__ __forceinline__ void read(const LcmAdamWTensor &tensor, int64_t at) {
    load<V>(tensor.parameter + at, parameter);
    if (tensor.average) load<V>(tensor.average + at, average);
    if (!tensor.gradient) return;
    load<V>(tensor.first_moment + at, first);
    load<V>(tensor.second_moment + at, second);
    load<V>(static_cast<const T *>(tensor.gradient) + at, gradient);
  }

  __device__ __forceinline__ void update(const LcmAdamWTensor &tensor, float factor) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (tensor.gradient) {
        float g = gradient[i] * factor;
        first[i] += (g - first[i]) * tensor.rest1;
        second[i] = second[i] * tensor.beta2 + g * g * tensor.rest2;
        float denominator = sqrtf(second[i]) / tensor.root_correction + tensor.epsilon;
        parameter[i] = parameter[i] * tensor.keep - tensor.step_size * first[i] / denominator;
      }
      if (tensor.average) average[i] += (parameter[i] - average[i]) * tensor.average_rest;
    }
  }

  __device__ __forceinline__ void write(const LcmAdamWTensor &tensor, int64_t at) const {
    if (tensor.average) store<V>(tensor.average + at, average);
    if (tensor.shadow) store<V>(static_cast<__nv_bfloat16 *>(tensor.shadow) + at, parameter);
    if (!tensor.gradient) return;
    store<V>(tensor.parameter + at, parameter);
    store<V>(tensor.first_moment + at, first);
    store<V>(tensor.second_moment + at, second);
  }
};

template <class T>
__device__ __forceinline__ void update_chunk(const LcmAdamWTensor &tensor, int64_t start, int64_t end, float factor,
                                             bool by_packs) {
  if (by_packs) {
    for (; start + kPiece <= end; start += kPiece) {
      Elements<T, kWidth> elements[kBatch];
      int64_t at = start + threadIdx.x * kWidth;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) elements[k].read(tensor, at + k * kThreads * kWidth);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        elements[k].update(tensor, factor);
        elements[k].write(tensor, at + k * kThreads * kWidth);
      }
    }
  }
  for (int64_t at = start + threadIdx.x; at < end; at += kThreads) {
    Elements<T, 1> element;
    element.read(tensor, at);
    element.update(tensor, factor);
    element.write(tensor, at);
  }
}

// Grid: (chunks).
__global__ void __launch_bounds__(kThreads)
    update(const LcmAdamWTensor *tensors, int count, const LcmAdamWReport *report) {
  if (report->skipped) return;
  int64_t chunk = blockIdx.x;
  const LcmAdamWTensor tensor = tensor_of(tensors, count, chunk);
  int64_t start = (chunk - tensor.first_chunk) * LCM_ADAMW_CHUNK;
  int64_t end = min(start + LCM_ADAMW_CHUNK, tensor.length);
  uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.parameter) | reinterpret_cast<uintptr_t>(tensor.first_moment) |
                        reinterpret_cast<uintptr_t>(tensor.second_moment) | reinterpret_cast<uintptr_t>(tensor.gradient) |
                        reinterpret_cast<uintptr_t>(tensor.average) | reinterpret_cast<uintptr_t>(tensor.shadow);
  bool by_packs = addresses % 16 == 0;
  float factor = report->factor;
  switch (tensor.gradient_dtype) {
    case 0: update_chunk<float>(tensor, start, end, factor, by_packs); break;
    case 1: update_chunk<__nv_bfloat16>(tensor, start, end, factor, by_packs); break;
    default: update_chunk<__half>(tensor, start, end, factor, by_packs); break;
  }
}

} // namespace

extern "C" size_t lcm_adamw_workspace(int64_t chunks) { return chunks < 0 ? 0 : sizeof(double) * chunks; }

extern "C" int lcm_adamw_step(const LcmAdamWTensor *tensors, int32_t count, int64_t chunks, float gradient_scale,
                              double max_norm, LcmAdamWReport *report, void *workspace, cudaStream_t stream) {
  if (count < 0 || chunks < 0 || chunks >= (1ll << 31) || (chunks > 0 && count == 0)) return -1;
  auto *partial = static_cast<double *>(workspace);
  if (chunks > 0) {
    partial_norms<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(tensors, count, partial);
    if (int error = launched()) return error;
  }
  clip<<<1, 1024, 0, stream>>>(partial, chunks, gradient_scale, max_norm, report);
  if (int error = launched()) return error;
  if (chunks == 0) return 0;
  update<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(tensors, count, report);
  return launched();
}
