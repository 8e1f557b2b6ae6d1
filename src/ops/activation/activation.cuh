// The activation functions on the device: codes 0 none, 1 SiLU, 2 GELU (by erf), 3 quick GELU, 4 ReLU.
//
// The code is a run-time argument: it is the same for a whole launch, so the branch costs one jump per pack.
#pragma once
#include "../elements.cuh"

namespace lcm {

// 1 / (1 + exp(-x)). Not `precise`: by the fast exponential, whose error is far below what bf16 and f16 keep.
template <bool precise>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (precise) return 1.0f / (1.0f + expf(-x));
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

__device__ __forceinline__ float normal_distribution(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752f)); }

template <bool precise>
__device__ __forceinline__ float normal_density(float x) {
  float square = -0.5f * x * x;
  return 0.39894228040143268f * (precise ? expf(square) : __expf(square));
}

constexpr float kQuickGelu = 1.702f;

// Results of element type T want full f32 precision only where T is f32.
template <class T>
constexpr bool kPrecise = sizeof(T) == 4;

template <class T, int V>
__device__ __forceinline__ void activate(int code, float (&x)[V]) {
  switch (code) {
    case 1:
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] *= sigmoid<kPrecise<T>>(x[i]);
      break;
    case 2:
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] *= normal_distribution(x[i]);
      break;
    case 3:
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] *= sigmoid<kPrecise<T>>(kQuickGelu * x[i]);
      break;
    case 4:
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i]; // NaN passes through
      break;
    default: break;
  }
}

// Multiplies the gradient `g` by the derivative at `x`.
template <class T, int V>
__device__ __forceinline__ void times_derivative(int code, const float (&x)[V], float (&g)[V]) {
  constexpr bool precise = kPrecise<T>;
  switch (code) {
    case 1:
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float s = sigmoid<precise>(x[i]);
        g[i] *= s + x[i] * s * (1.0f - s);
      }
      break;
    case 2:
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] *= normal_distribution(x[i]) + x[i] * normal_density<precise>(x[i]);
      break;
    case 3:
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float s = sigmoid<precise>(kQuickGelu * x[i]);
        g[i] *= s + kQuickGelu * x[i] * s * (1.0f - s);
      }
      break;
    case 4:
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] *= x[i] <= 0.0f ? 0.0f : 1.0f;
      break;
    default: break;
  }
}

inline bool is_activation(int code) { return code >= 0 && code <= 4; }

} // namespace lcm
