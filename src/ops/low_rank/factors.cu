// The factors of several layers as two matrices, and their gradients back: for what the gradients' own kernels do not
// take. One thread an element: the matrices are small, and one launch in place of one a factor is all that is asked for.
#include "low_rank.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

template <typename T> __device__ T from_float(float x) { return T(x); }
template <typename T> __device__ float to_float(T x) { return float(x); }

// Which layer an element belongs to, and where in its factor it lies; `factor` is -1 for an element that is always zero.
struct Place {
  int layer, factor; // 0 down, 1 up, -1 none
  int64_t index;
};

__device__ Place place_of(const LcmLowRank &a, int64_t element) {
  const int64_t downs = int64_t(a.width) * a.input;
  Place place{0, -1, 0};
  if (element < downs) {
    int row = int(element / a.input);
    for (int layer = 0; layer < a.count; layer++) {
      if (row < a.rank[layer]) {
        place = {layer, 0, int64_t(row) * a.input + element % a.input};
        break;
      }
      row -= a.rank[layer];
    }
    return place;
  }
  int row = int((element - downs) / a.width), column = int((element - downs) % a.width);
  for (int layer = 0; layer < a.count; layer++) {
    if (row < a.output[layer]) {
      if (column >= 0 && column < a.rank[layer]) place = {layer, 1, int64_t(row) * a.rank[layer] + column};
      break;
    }
    row -= a.output[layer];
    column -= a.rank[layer];
  }
  return place;
}

template <typename T> __global__ void pack(LcmLowRank a, int64_t elements) {
  const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= elements) return;
  const Place place = place_of(a, element);
  const float value = place.factor < 0    ? 0.f
                      : place.factor == 0 ? static_cast<const float *>(a.down[place.layer])[place.index]
                                          : a.scale[place.layer] * static_cast<const float *>(a.up[place.layer])[place.index];
  const int64_t downs = int64_t(a.width) * a.input;
  (element < downs ? static_cast<T *>(a.down_all) + element : static_cast<T *>(a.up_all) + (element - downs))[0] = from_float<T>(value);
}

template <typename T> __global__ void unpack(LcmLowRank a, int64_t elements) {
  const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= elements) return;
  const Place place = place_of(a, element);
  if (place.factor < 0) return;
  const int64_t downs = int64_t(a.width) * a.input;
  if (place.factor == 0) {
    if (a.down_gradient[place.layer])
      a.down_gradient[place.layer][place.index] = to_float(static_cast<const T *>(a.down_all)[element]);
  } else if (a.up_gradient[place.layer]) {
    a.up_gradient[place.layer][place.index] = a.scale[place.layer] * to_float(static_cast<const T *>(a.up_all)[element - downs]);
  }
}

int64_t elements_of(const LcmLowRank &a) {
  int64_t outputs = 0;
  for (int layer = 0; layer < a.count; layer++) outputs += a.output[layer];
  return int64_t(a.width) * (a.input + outputs);
}

template <typename T> int launch(const LcmLowRank &a, bool forward, cudaStream_t stream) {
  const int64_t elements = elements_of(a);
  const unsigned blocks = unsigned((elements + 255) / 256);
  if (forward) pack<T><<<blocks, 256, 0, stream>>>(a, elements);
  else unpack<T><<<blocks, 256, 0, stream>>>(a, elements);
  return cudaGetLastError();
}

int dispatch(const LcmLowRank *call, bool forward, cudaStream_t stream) {
  if (call->count < 1 || call->count > LCM_LOW_RANK_LAYERS || call->factor_dtype != 0) return -1;
  switch (call->dtype) {
  case 0: return launch<float>(*call, forward, stream);
  case 1: return launch<__nv_bfloat16>(*call, forward, stream);
  case 2: return launch<__half>(*call, forward, stream);
  default: return -1;
  }
}

} // namespace

extern "C" int lcm_low_rank_pack(const LcmLowRank *call, cudaStream_t stream) { return dispatch(call, true, stream); }
extern "C" int lcm_low_rank_unpack(const LcmLowRank *call, cudaStream_t stream) { return dispatch(call, false, stream); }
