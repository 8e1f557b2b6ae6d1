// Pointwise activations on CUDA devices. Codes: 0 none, 1 SiLU, 2 GELU (by erf), 3 quick GELU, 4 ReLU.
// dtype: 0 = f32, 1 = bf16, 2 = f16. All return 0, a cudaError_t, or -1 for arguments they do not take.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// y = act(x).
int lcm_activation_forward(const void *x,   // (count,) dtype
                           void *y,         // (count,) dtype; may be x
                           int64_t count,   // elements
                           int activation,  // code
                           int dtype, cudaStream_t stream);

// dx = dy act'(x).
int lcm_activation_backward(const void *x,  // (count,) dtype: what the forward pass took
                            const void *dy, // (count,) dtype
                            void *dx,       // (count,) dtype; may be dy
                            int64_t count, int activation, int dtype, cudaStream_t stream);
#ifdef __cplusplus
}
#endif
