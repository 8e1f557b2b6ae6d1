// Launch of the second kernel of a pair while the first still runs, on devices that can (Hopper: programmatic dependent
// launch): its blocks come up, and read what the first does not write, during the first one's tail. Capturable in
// graphs.
//
// The first kernel calls `let_next_start` where only its tail is left, the second `wait_for_previous` before it reads
// what the first wrote: that returns when the first has ended and its writes are seen. Only a kernel whose successor is
// launched by the same launcher may call `let_next_start`: a library's kernel, cuBLAS's for instance, may be launched to
// start early too, and not wait.
#pragma once
#include <cuda_runtime.h>

namespace lcm {

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Says for which architecture the code was compiled that the device runs: all kernels are compiled for the same ones. A
// template, so that files which do not ask need not have it.
template <int = 0> __global__ void compiled_for() {}

inline bool has_dependent_launch() {
  static int cached = -1; // as in `multiprocessors`
  int known = __atomic_load_n(&cached, __ATOMIC_RELAXED);
  if (known < 0) {
    int device = 0, major = 0;
    cudaFuncAttributes code = {};
    // A device of capability 9 or newer may run the code for 8.0, in which nothing waits.
    known = cudaGetDevice(&device) == cudaSuccess &&
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
            cudaFuncGetAttributes(&code, compiled_for<>) == cudaSuccess && code.ptxVersion >= 90;
    __atomic_store_n(&cached, known, __ATOMIC_RELAXED);
  }
  return known > 0;
}

// kernel<<<grid, threads, shared, stream>>>(arguments...), whose blocks may start before the kernel before has ended.
template <class... Parameters, class... Arguments>
int launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, cudaStream_t stream,
                     Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = has_dependent_launch() ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

} // namespace lcm
