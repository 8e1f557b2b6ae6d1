#pragma once
#include <stddef.h>
#include <stdint.h>

// y = convolution(x, weight) + bias + per_sample_bias + residual, channels last; rectified: where that is negative y is 0.
typedef struct {
  const void *x;               // (batch, height, width, input channels)
  const void *weight;          // (output channels, kernel, kernel, input channels)
  const void *bias;            // (output channels) or null, dtype of x
  const void *per_sample_bias; // (batch, output channels) or null: the time embedding of a resnet, added to every pixel of its sample
  const void *residual;        // (batch, out_height, out_width, output channels) or null: added
  void *y;                     // (batch, out_height, out_width, output channels)
  int32_t batch, height, width, input_channels, output_channels, kernel, stride, padding /* left and above */, padding_end /* right and below */, dtype;
  int32_t rectified;
} LcmConv2d;

// dx = the gradient of the input, given that of the output (batch, out_height, out_width, output channels).
typedef struct {
  const void *dy, *weight;
  const void *residual; // of the shape of dx, or null: added
  const void *gate;     // instead of a residual; of the shape of dx, or null: where it is not positive, dx is 0
  void *dx;
  int32_t batch, height, width /* of x */, input_channels, output_channels, kernel, stride, padding, padding_end, dtype;
} LcmConv2dInputGradient;
