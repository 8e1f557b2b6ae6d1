#pragma once
#include <stddef.h>
#include <stdint.h>

// y = convolution(x, weight) + bias + per_sample_bias + residual, channels last.
typedef struct {
  const void *x;               // (batch, height, width, input channels)
  const void *weight;          // (output channels, kernel, kernel, input channels)
  const void *bias;            // (output channels) or null, dtype of x
  const void *per_sample_bias; // (batch, output channels) or null: the time embedding of a resnet, added to every pixel of its sample
  const void *residual;        // (batch, out_height, out_width, output channels) or null: added
  void *y;                     // (batch, out_height, out_width, output channels), the last in rows of y_row numbers
  int32_t batch, height, width, input_channels, output_channels, kernel, stride, padding, dtype;
  int32_t y_row; // output channels, rounded up to a multiple of 8; what is behind them is written too, with anything
} LcmConv2d;

// dx = the gradient of the input, given that of the output (batch, out_height, out_width, output channels).
typedef struct {
  const void *dy, *weight;
  void *dx;
  int32_t batch, height, width /* of x */, input_channels, output_channels, kernel, stride, padding, dtype;
} LcmConv2dInputGradient;
