// The gradients of the low-rank factors of layers that share their input x (tokens, input), from x and the gradient g
// (tokens, outputs) of their outputs y = x (weight + scale * up down)^T, side by side:
//
//   down_gradient = scale * (g up)^T x        up_gradient = scale * g^T (x down^T)
//
// Three kernels. `by_tokens` makes the narrow matrices x down^T and g up (at most 16 numbers a token), `by_channels` the
// gradients themselves from those, in parts of the tokens, which `finish` adds in a fixed order. Bound by memory: x and g
// are read twice, the second time in good part from the second-level cache, by 16 bytes a thread straight into the
// registers of mma.sync's operands. That works without shared memory as the order of what a product sums over is
// free: the eight adjacent numbers a thread has loaded take the places that the instruction gives the thread.
#include "../elements.cuh"
#include "narrow.h"

namespace {

using lcm::kNarrowRanks;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

__device__ __forceinline__ uint4 load_or_zero(const void *base, int64_t index, bool there) {
  return there ? *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(base) + index) : make_uint4(0, 0, 0, 0);
}

// d += a b, a 16 x 16, b 16 x 8.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
#define LCM_MULTIPLY(Type, name)                                                                                       \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply<Type>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,    \
                                                 uint32_t b0, uint32_t b1) {                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "    \
        "{%0, %1, %2, %3};"                                                                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                       \
  }
LCM_MULTIPLY(__nv_bfloat16, "bf16")
LCM_MULTIPLY(__half, "f16")
#undef LCM_MULTIPLY

// ---------------------------------------------------------------------------------------------------------------------

// The narrow matrices lie transposed, (kNarrowRanks, padded tokens), first x down^T, then g up.
constexpr int kTokens = 32;    // a block's tokens in `by_tokens`: two tiles of 16
constexpr int kChannels = 32;  // a step's channels of a warp: two products of 16
constexpr int kStep = 16;      // a step's tokens of a warp in `by_channels`
constexpr int kSlab = 64;      // a block's channels there

__host__ __device__ int64_t padded_tokens(int64_t tokens) { return (tokens + kTokens - 1) / kTokens * kTokens; }

// A matrix (tokens, channels) of one of the products: x, or a layer's columns of g.
struct Wide {
  const uint16_t *from;
  int64_t stride;
  int channels;
};

__device__ Wide wide_matrix(const LcmLowRank &call, int job) {
  if (job == 0) return {static_cast<const uint16_t *>(call.x), call.input, call.input};
  const int before = lcm::outputs_before(call, job - 1), all = lcm::outputs_before(call, call.count);
  return {static_cast<const uint16_t *>(call.gradient) + before, all, call.output[job - 1]};
}

// Block (token tile, job): job 0 makes x down^T of all layers, job i + 1 g up of layer i. The warps share the channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) by_tokens(const LcmLowRank call) {
  lcm::wait_for_previous();
  const int job = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int ranks = job == 0 ? lcm::ranks_before(call, call.count) : call.rank[job - 1];
  if (ranks == 0) return;
  const Wide wide = wide_matrix(call, job);
  const uint16_t *factors = static_cast<const uint16_t *>(call.narrow_factors) + (job == 0 ? 0 : lcm::narrow_up(call, job - 1));
  const int64_t token = int64_t(blockIdx.x) * kTokens;
  const bool second = ranks > 8;
  float sums[2][2][4] = {};
#pragma unroll 1 // registers for four blocks a multiprocessor do more than loads further ahead
  for (int start = warp * kChannels; start < wide.channels; start += kWarps * kChannels) {
    const int channel = start + quarter * 8;
    const bool inside = channel < wide.channels;
    uint4 a[4], b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t at = token + row + 8 * i;
      a[i] = load_or_zero(wide.from, at * wide.stride + channel, inside && at < call.tokens);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      b[n] = load_or_zero(factors, int64_t(row + 8 * n) * wide.channels + channel, inside && (n == 0 || second));
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        multiply<T>(sums[m][n], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b[n].x, b[n].y);
        multiply<T>(sums[m][n], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b[n].z, b[n].w);
      }
    }
  }
  lcm::let_next_start();
  __shared__ float parts[kWarps][kNarrowRanks][kTokens + 1];
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) parts[warp][8 * n + 2 * quarter + i % 2][16 * m + row + i / 2 * 8] = sums[m][n][i];
    }
  }
  __syncthreads();
  const int64_t stride = padded_tokens(call.tokens);
  T *narrow = static_cast<T *>(call.workspace) + (job == 0 ? 0 : (kNarrowRanks + lcm::ranks_before(call, job - 1)) * stride) + token;
  for (int rank = warp; rank < ranks; rank += kWarps) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kWarps; part++) sum += parts[part][rank][lane];
    narrow[rank * stride + lane] = T(sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t tokens; // of a part
  int parts;
};

__host__ __device__ Plan plan_of(const LcmLowRank &call) {
  const int64_t tokens = call.tokens >= 8192 ? 1024 : call.tokens >= 2048 ? 512 : kWarps * kStep;
  return {tokens, int((call.tokens + tokens - 1) / tokens)};
}

__host__ __device__ int slabs_of(int channels) { return (channels + kSlab - 1) / kSlab; }

// How many sums the jobs before a job have, (ranks, channels) each; of the number of jobs: how many there are. They lie
// in the workspace job by job, and in a job part by part.
__host__ __device__ int64_t sums_before(const LcmLowRank &call, int job) {
  if (job == 0) return 0;
  int64_t sums = int64_t(lcm::ranks_before(call, call.count)) * call.input;
  for (int i = 0; i + 1 < job; i++) sums += int64_t(call.rank[i]) * call.output[i];
  return sums;
}

__host__ __device__ int64_t narrow_bytes(const LcmLowRank &call) { return 2 * kNarrowRanks * padded_tokens(call.tokens) * 2; }

// Block (slab of channels of all jobs, part): narrow^T wide of job 0, with g up, or of a layer, with its x down^T. The
// warps share the part's tokens.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) by_channels(const LcmLowRank call) {
  int slab = blockIdx.x, job = 0;
  for (; job <= call.count; job++) {
    const bool any = job == 0 || call.rank[job - 1] > 0;
    const int slabs = any ? slabs_of(job == 0 ? call.input : call.output[job - 1]) : 0;
    if (slab < slabs) break;
    slab -= slabs;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int ranks = job == 0 ? lcm::ranks_before(call, call.count) : call.rank[job - 1];
  const Wide wide = wide_matrix(call, job);
  const Plan plan = plan_of(call);
  const int64_t stride = padded_tokens(call.tokens);
  const uint16_t *narrow = static_cast<const uint16_t *>(call.workspace) + (job == 0 ? kNarrowRanks : lcm::ranks_before(call, job - 1)) * stride;
  const int channel = slab * kSlab + 8 * row;
  const int64_t first = int64_t(blockIdx.y) * plan.tokens, end = first + plan.tokens;
  lcm::wait_for_previous();
  float sums[8][4] = {};
#pragma unroll 1
  for (int64_t start = first + warp * kStep; start < end; start += kWarps * kStep) {
    const int64_t token = start + 4 * quarter;
    uint4 values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      values[i] = load_or_zero(wide.from, (token + i) * wide.stride + channel, channel < wide.channels && token + i < call.tokens);
    }
    uint2 a[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bool there = row + 8 * i < ranks && token < stride;
      a[i] = there ? *reinterpret_cast<const uint2 *>(narrow + (row + 8 * i) * stride + token) : make_uint2(0, 0);
    }
    // Of four tokens by eight channels to eight pairs of tokens.
    const uint32_t *v[4] = {&values[0].x, &values[1].x, &values[2].x, &values[3].x};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const uint32_t select = j % 2 == 0 ? 0x5410 : 0x7632;
      multiply<T>(sums[j], a[0].x, a[1].x, a[0].y, a[1].y, __byte_perm(v[0][j / 2], v[1][j / 2], select),
                  __byte_perm(v[2][j / 2], v[3][j / 2], select));
    }
  }
  lcm::let_next_start();
  // A thread has rank `row` (and that plus 8) of the channels 16 quarter + {0, 8} + j.
  __shared__ float parts[kWarps][kNarrowRanks][kSlab + 4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float *to = &parts[warp][row + i / 2 * 8][16 * quarter + i % 2 * 8 + j];
      *reinterpret_cast<float4 *>(to) = make_float4(sums[j][i], sums[j + 1][i], sums[j + 2][i], sums[j + 3][i]);
    }
  }
  __syncthreads();
  float *out = reinterpret_cast<float *>(static_cast<char *>(call.workspace) + narrow_bytes(call)) +
               sums_before(call, job) * plan.parts + int64_t(blockIdx.y) * ranks * wide.channels + slab * kSlab;
  for (int i = threadIdx.x; i < ranks * kSlab; i += kThreads) {
    const int rank = i / kSlab, column = i % kSlab;
    if (slab * kSlab + column >= wide.channels) continue;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kWarps; part++) sum += parts[part][rank][column];
    out[int64_t(rank) * wide.channels + column] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int kFinish = 4; // adjacent channels of a thread

// Adds the parts, and writes the gradients.
__global__ void __launch_bounds__(kThreads) finish(const LcmLowRank call) {
  const int parts = plan_of(call).parts;
  unsigned place = (blockIdx.x * kThreads + threadIdx.x) * kFinish, start = 0, sums = 0;
  int job = 0, rank = 0, channels = 0;
  for (; job <= call.count; job++) {
    rank = job == 0 ? lcm::ranks_before(call, call.count) : call.rank[job - 1];
    channels = job == 0 ? call.input : call.output[job - 1];
    sums = unsigned(rank) * channels;
    if (place < sums) break;
    place -= sums;
    start += sums;
  }
  if (job > call.count) return;
  int layer = job - 1;
  rank = int(place / channels);
  const int channel = int(place % channels);
  const float *from = reinterpret_cast<const float *>(static_cast<const char *>(call.workspace) + narrow_bytes(call)) +
                      int64_t(start) * parts + place;
  lcm::wait_for_previous();
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int part = 0; part < parts; part++) {
    const float4 more = *reinterpret_cast<const float4 *>(from + int64_t(part) * sums);
    sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
  }
  const float values[kFinish] = {sum.x, sum.y, sum.z, sum.w};
  if (job == 0) {
    layer = 0;
    while (rank >= call.rank[layer]) rank -= call.rank[layer++];
  }
  float *to = job == 0 ? call.down_gradient[layer] : call.up_gradient[layer];
  if (!to) return;
#pragma unroll
  for (int i = 0; i < kFinish; i++) {
    to[job == 0 ? int64_t(rank) * channels + channel + i : int64_t(channel + i) * call.rank[layer] + rank] = call.scale[layer] * values[i];
  }
}

template <class T>
int launch(const LcmLowRank &call, cudaStream_t stream) {
  const Plan plan = plan_of(call);
  const int64_t tiles = lcm::divide_up<int64_t>(call.tokens, kTokens);
  int error = lcm::launch_dependent(by_tokens<T>, dim3(unsigned(tiles), call.count + 1), dim3(kThreads), 0, stream, call);
  if (error) return error;
  int slabs = slabs_of(call.input);
  for (int i = 0; i < call.count; i++) slabs += call.rank[i] > 0 ? slabs_of(call.output[i]) : 0;
  error = lcm::launch_dependent(by_channels<T>, dim3(slabs, plan.parts), dim3(kThreads), 0, stream, call);
  if (error) return error;
  const int64_t numbers = sums_before(call, call.count + 1);
  return lcm::launch_dependent(finish, dim3(unsigned(lcm::divide_up<int64_t>(numbers, kThreads * kFinish))), dim3(kThreads), 0, stream, call);
}

} // namespace

extern "C" size_t lcm_low_rank_workspace(const LcmLowRank *call) {
  const int64_t sums = sums_before(*call, call->count + 1) * plan_of(*call).parts;
  return size_t(narrow_bytes(*call) + sums * int64_t(sizeof(float)));
}

extern "C" int lcm_low_rank_gradients(const LcmLowRank *call, cudaStream_t stream) {
  if (call->count < 1 || call->count > LCM_LOW_RANK_LAYERS || !lcm::takes_narrow(*call) || call->tokens < 1 ||
      plan_of(*call).parts > 65535 || sums_before(*call, call->count + 1) > 0x7fffffff || !lcm::aligned(call->x, call->gradient, call->narrow_factors, call->workspace)) {
    return -1;
  }
  return call->dtype == 1 ? launch<__nv_bfloat16>(*call, stream) : launch<__half>(*call, stream);
}
