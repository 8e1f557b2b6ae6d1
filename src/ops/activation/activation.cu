// Pointwise activations: one pack a thread.
#include "activation.h"

#include "activation.cuh"

using namespace lcm;

namespace {

template <class T>
struct Value {
  const T *x;
  T *y;
  int code;
  template <int V>
  __device__ void at(int64_t i) const {
    float v[V];
    load<V>(x + i, v);
    activate<T>(code, v);
    store<V>(y + i, v);
  }
};

template <class T>
struct Gradient {
  const T *x, *dy;
  T *dx;
  int code;
  template <int V>
  __device__ void at(int64_t i) const {
    float v[V], g[V];
    load<V>(x + i, v);
    load<V>(dy + i, g);
    times_derivative<T>(code, v, g);
    store<V>(dx + i, g);
  }
};

} // namespace

extern "C" int lcm_activation_forward(const void *x, void *y, int64_t count, int activation, int dtype,
                                      cudaStream_t stream) {
  if (!is_activation(activation)) return -1;
  return dispatch(dtype, aligned(x, y), [&](auto kind) {
    using T = typename decltype(kind)::type;
    return map<decltype(kind)::width>(Value<T>{(const T *)x, (T *)y, activation}, count, stream);
  });
}

extern "C" int lcm_activation_backward(const void *x, const void *dy, void *dx, int64_t count, int activation, int dtype,
                                       cudaStream_t stream) {
  if (!is_activation(activation)) return -1;
  return dispatch(dtype, aligned(x, dy, dx), [&](auto kind) {
    using T = typename decltype(kind)::type;
    return map<decltype(kind)::width>(Gradient<T>{(const T *)x, (const T *)dy, (T *)dx, activation}, count, stream);
  });
}
