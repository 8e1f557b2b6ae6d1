// Group normalisation that reads its inputs once, for devices with thread block clusters.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace lcm {

// The arguments of both passes, as the launchers of group_norm.h name them.
struct GroupNormCall {
  const void *x1, *x2, *weight, *bias;
  int64_t batch, pixels;
  int channels1, channels2, groups, activation, dtype;
};

// The forward pass, or -1 where the device or the sizes do not allow it.
int resident_forward(const GroupNormCall &call, void *y, float *mean, float *rstd, float eps, cudaStream_t stream);

// The gradients of the inputs (dx1 null: not wanted), or -1. Where `by_channel` is not null, it gets the partial sums of
// the gradients of weight and bias, (parts, 2, channels), and `parts` their number.
int resident_backward(const GroupNormCall &call, const float *mean, const float *rstd, const void *dy, void *dx1,
                      void *dx2, float *by_channel, int *parts, cudaStream_t stream);

// The most parts there are for these sizes.
int64_t resident_parts(int64_t batch);

} // namespace lcm
