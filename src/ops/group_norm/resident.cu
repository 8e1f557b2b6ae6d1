// Group normalisation that reads its inputs once.
//
// Groups are independent, so a cluster of up to 16 blocks takes a few groups of one sample, of all its pixels: each block
// copies its pixels into shared memory, the blocks exchange their groups' moments through the cluster's shared memory, and
// the block normalises what it holds. Against the two kernels of group_norm.cu that saves the second reading of x (in the
// backward pass, of x and dy), a launch, and the way of the partial sums through memory.
//
// A thread keeps to one pack of channels, and to the pixels it copied itself.
#include "resident.h"

#include "cluster.cuh"
#include "tiles.cuh"

using namespace lcm;

namespace {

// Threads of a block for one input (forward) or two (backward, with as many registers again): such that two blocks fit on a
// multiprocessor, of which one computes while the other waits for memory.
constexpr int threads_for(int inputs) { return inputs == 1 ? 512 : 256; }

constexpr int kMostCluster = 16;               // the most Hopper allows
constexpr int kMostShared = 225 * 1024;        // of a block; two blocks share a multiprocessor below half of it
constexpr int kSharedReserve = 1024;           // what the system takes of each block
constexpr int kBatches = 4;                    // copies are waited for, and summed up, in so many parts

struct ResidentPlan {
  int cluster = 0;     // blocks of a cluster; 0: no plan
  int threads;
  int groups = 1, width; // of a cluster: groups, and channels in them
  int columns, rows;   // of a block: packs side by side, pixels at once
  int per_block;       // pixels of all blocks but the last
  size_t tile, shared; // bytes of a block: one input, all
  bool full;           // enough blocks for the device, and room for two on a multiprocessor

  // The widest set of groups, for long accesses, with which there is a block for each multiprocessor and two fit on one;
  // else the widest that fits at all, with a block for each if possible.
  ResidentPlan(const GroupNormCall &call, int vector, int inputs) {
    int channels = call.channels1 + call.channels2, per_group = channels / call.groups;
    size_t element = call.dtype == 0 ? 4 : 2;
    int best = -1;
    for (int g = call.groups; g >= 1; --g) {
      if (call.groups % g != 0 || g * per_group % vector != 0 || g * per_group / vector > threads_for(inputs)) continue;
      ResidentPlan plan(call, g, per_group, vector, inputs, element, kMostCluster);
      if (plan.shared > kMostShared) continue;
      bool busy = call.batch * (call.groups / g) * kMostCluster >= multiprocessors() * 9 / 10;
      bool pairs = 2 * (plan.shared + kSharedReserve) <= kMostShared + 2 * kSharedReserve;
      int score = busy && pairs ? 2 : busy ? 1 : 0;
      if (score < best || (score == 0 && best == 0 && plan.tile < 8192)) continue;
      if (score > best || score == 0) {
        best = score;
        *this = plan;
        full = score == 2;
      }
      if (score == 2) break;
    }
    // Few pixels: fewer blocks, of which each still has something to do.
    while (cluster > 1 && tile < 4096) {
      bool was_full = full;
      *this = ResidentPlan(call, groups, per_group, vector, inputs, element, cluster / 2);
      full = was_full;
    }
  }

private:
  ResidentPlan(const GroupNormCall &call, int groups, int per_group, int vector, int inputs, size_t element, int cluster)
      : cluster(cluster), threads(threads_for(inputs)), groups(groups), width(groups * per_group),
        columns(width / vector), rows(threads / columns),
        per_block(static_cast<int>(divide_up<int64_t>(call.pixels, cluster))),
        tile(divide_up<size_t>(per_block * element * width, 16) * 16),
        shared(inputs * tile + sizeof(float) * (threads * vector + 2 * width) + 2 * sizeof(float2) * groups),
        full(false) {}
};

// What a block knows of its place.
struct Place {
  int rank, ranks, first_channel, first_group, count; // count: pixels
  int64_t sample, pixel;                              // sample: its index; pixel: the first, counted through the batch
  int row, column;                                    // of the thread; row -1: it has no part in the pixels

  __device__ __forceinline__ Place(const ResidentPlan &plan, int64_t pixels) {
    rank = blockIdx.x;
    ranks = gridDim.x;
    first_group = blockIdx.y * plan.groups;
    first_channel = blockIdx.y * plan.width;
    sample = blockIdx.z;
    int64_t first = static_cast<int64_t>(rank) * plan.per_block;
    int64_t left = pixels - first;
    count = static_cast<int>(left < 0 ? 0 : left < plan.per_block ? left : plan.per_block);
    pixel = sample * pixels + first;
    row = threadIdx.x / plan.columns;
    column = threadIdx.x % plan.columns;
    if (row >= plan.rows) row = -1;
  }
};

// Starts the copies of batch `batch` of kBatches: of the thread's pixels, every kBatches-th stretch of 1 / kBatches.
struct Stretch {
  int begin, end;
  __device__ __forceinline__ Stretch(const Place &place, const ResidentPlan &plan, int batch) {
    int steps = divide_up(divide_up(place.count, plan.rows), kBatches); // pixels of a thread in a batch
    begin = place.row + batch * steps * plan.rows;
    end = min(place.count, (batch + 1) * steps * plan.rows);
    if (place.row < 0) end = begin;
  }
};

// Calls f(batch) for 0 .. kBatches, each after the copies of the batch have come.
template <class F>
__device__ __forceinline__ void for_batches(F f) {
  static_assert(kBatches == 4, "waits for each batch");
  wait_copies<3>();
  f(0);
  wait_copies<2>();
  f(1);
  wait_copies<1>();
  f(2);
  wait_copies<0>();
  f(3);
}

template <class T, int V>
__global__ void __launch_bounds__(threads_for(1), 2)
    forward(Joined<const T> x, const T *weight, const T *bias, T *y, float *mean, float *rstd, ResidentPlan plan,
            int64_t pixels, int groups, float eps, int activation) {
  extern __shared__ __align__(16) char memory[];
  T *tile = reinterpret_cast<T *>(memory);
  float *scratch = reinterpret_cast<float *>(memory + plan.tile), *means = scratch + blockDim.x * V;
  float *squares = means + plan.width;
  float2 *own = reinterpret_cast<float2 *>(squares + plan.width), *whole = own + plan.groups;
  Place place(plan, pixels);
  int channels = x.channels1 + x.channels2, per_group = channels / groups, c = place.first_channel + place.column * V;
  int stride;
  const T *from = x.column(place.pixel, c, stride);
  T *held = tile + place.column * V;
  for (int batch = 0; batch < kBatches; ++batch) {
    Stretch stretch(place, plan, batch);
    for (int p = stretch.begin; p < stretch.end; p += plan.rows)
      start_copy<V * sizeof(T)>(held + p * plan.width, from + static_cast<int64_t>(p) * stride);
    end_batch();
  }
  // Moments of the differences from the sample's first pixel, per channel: large means do not cancel.
  float shift[V], first[V] = {}, second[V] = {};
  load<V>(x.column(place.sample * pixels, c, stride), shift);
  Pack<T, V> weights = load_pack<V>(weight + c), biases = load_pack<V>(bias + c); // asked for early, needed late
  if (place.row == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) squares[place.column * V + i] = shift[i]; // until the sums are there
  }
  for_batches([&](int batch) {
    Stretch stretch(place, plan, batch);
#pragma unroll 2
    for (int p = stretch.begin; p < stretch.end; p += plan.rows) {
      float values[V];
      load<V>(held + p * plan.width, values);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float difference = values[i] - shift[i];
        first[i] += difference;
        second[i] += difference * difference;
      }
    }
  });
  float count = place.count > 0 ? static_cast<float>(place.count) : 1.0f;
  sum_rows(first, scratch, plan.rows, plan.columns, 0, plan.width, [&](int channel, float sum) { means[channel] = sum; });
  sum_rows(second, scratch, plan.rows, plan.columns, 0, plan.width, [&](int channel, float sum) {
    float off = means[channel] / count, origin = squares[channel];
    squares[channel] = fmaxf(sum - means[channel] * off, 0.0f);
    means[channel] = origin + off;
  });
  int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    const float *mean_of = means + group * per_group, *squares_of = squares + group * per_group;
    float origin = mean_of[0], sum = 0.0f;
    for (int i = lane; i < per_group; i += 32) sum += mean_of[i] - origin;
    float centre = origin + warp_sum(sum) / per_group;
    sum = 0.0f;
    for (int i = lane; i < per_group; i += 32) {
      float off = mean_of[i] - centre;
      sum += squares_of[i] + place.count * off * off;
    }
    sum = warp_sum(sum);
    if (lane == 0) own[group] = make_float2(centre, sum);
  }
  cluster_arrive();
  cluster_wait();
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    float2 part = make_float2(0.0f, 0.0f);
    float share = 0.0f;
    if (lane < place.ranks) {
      part = read_peer(own + group, lane);
      int64_t left = pixels - static_cast<int64_t>(lane) * plan.per_block;
      share = static_cast<float>(left < 0 ? 0 : left < plan.per_block ? left : plan.per_block);
    }
    float origin = __shfl_sync(0xffffffffu, part.x, 0);
    float centre = origin + warp_sum(share * (part.x - origin)) / static_cast<float>(pixels), off = part.x - centre;
    float variance = warp_sum(part.y + per_group * share * off * off) / (static_cast<float>(pixels) * per_group);
    float2 moments = make_float2(centre, 1.0f / sqrtf(variance + eps));
    if (lane == 0) {
      whole[group] = moments;
      if (place.rank == 0) {
        mean[place.sample * groups + place.first_group + group] = moments.x;
        rstd[place.sample * groups + place.first_group + group] = moments.y;
      }
    }
  }
  cluster_arrive(); // this block reads its peers no more
  __syncthreads();
  float centre[V], scale[V], offset[V];
  to_floats<V>(weights, scale);
  to_floats<V>(biases, offset);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float2 moments = whole[(place.column * V + i) / per_group];
    centre[i] = moments.x;
    scale[i] *= moments.y;
  }
  T *to = y + place.pixel * channels + c;
  if (place.row >= 0) {
#pragma unroll 2
    for (int p = place.row; p < place.count; p += plan.rows) {
      float values[V];
      load<V>(held + p * plan.width, values);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = (values[i] - centre[i]) * scale[i] + offset[i];
      activate<T>(activation, values);
      store<V>(to + static_cast<int64_t>(p) * channels, values);
    }
  }
  cluster_wait(); // a block stays until its peers have read it
}

template <class T, int V>
__global__ void __launch_bounds__(threads_for(2), 2)
    backward(Joined<const T> x, const T *dy, const T *weight, const T *bias, const float *mean, const float *rstd,
             Joined<T> dx, ResidentPlan plan, int64_t pixels, int groups, int activation, float *by_channel) {
  extern __shared__ __align__(16) char memory[];
  T *x_tile = reinterpret_cast<T *>(memory), *g_tile = reinterpret_cast<T *>(memory + plan.tile);
  float *scratch = reinterpret_cast<float *>(memory + 2 * plan.tile), *plain = scratch + blockDim.x * V;
  float *along = plain + plan.width;
  float2 *own = reinterpret_cast<float2 *>(along + plan.width), *whole = own + plan.groups;
  Place place(plan, pixels);
  int channels = x.channels1 + x.channels2, per_group = channels / groups, c = place.first_channel + place.column * V;
  int stride;
  const T *from = x.column(place.pixel, c, stride), *gradient = dy + place.pixel * channels + c;
  T *held = x_tile + place.column * V, *held_g = g_tile + place.column * V;
  for (int batch = 0; batch < kBatches; ++batch) {
    Stretch stretch(place, plan, batch);
    for (int p = stretch.begin; p < stretch.end; p += plan.rows) {
      start_copy<V * sizeof(T)>(held + p * plan.width, from + static_cast<int64_t>(p) * stride);
      start_copy<V * sizeof(T)>(held_g + p * plan.width, gradient + static_cast<int64_t>(p) * channels);
    }
    end_batch();
  }
  float centre[V], scale[V], weights[V], offsets[V];
  load<V>(weight + c, weights);
  load<V>(bias + c, offsets);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    int64_t group = place.sample * groups + (c + i) / per_group;
    centre[i] = mean[group];
    scale[i] = rstd[group];
  }
  // The normalised input n and the gradient before the activation g of pixel p.
  auto recompute = [&](int p, float(&n)[V], float(&g)[V]) {
    float z[V];
    load<V>(held + p * plan.width, n);
    load<V>(held_g + p * plan.width, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      n[i] = (n[i] - centre[i]) * scale[i];
      z[i] = n[i] * weights[i] + offsets[i];
    }
    times_derivative<T>(activation, z, g);
  };
  float first[V] = {}, second[V] = {};
  for_batches([&](int batch) {
    Stretch stretch(place, plan, batch);
    for (int p = stretch.begin; p < stretch.end; p += plan.rows) {
      float n[V], g[V];
      recompute(p, n, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        first[i] += g[i];
        second[i] += g[i] * n[i];
      }
    }
  });
  sum_rows(first, scratch, plan.rows, plan.columns, 0, plan.width, [&](int channel, float sum) { plain[channel] = sum; });
  sum_rows(second, scratch, plan.rows, plan.columns, 0, plan.width, [&](int channel, float sum) { along[channel] = sum; });
  if (by_channel) {
    float *part = by_channel + (place.sample * place.ranks + place.rank) * 2 * channels + place.first_channel;
    for (int i = threadIdx.x; i < plan.width; i += blockDim.x) {
      part[i] = along[i];
      part[channels + i] = plain[i];
    }
  }
  int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    float sum = 0.0f, sum_n = 0.0f;
    for (int i = group * per_group + lane; i < (group + 1) * per_group; i += 32) {
      float w = static_cast<float>(weight[place.first_channel + i]);
      sum += w * plain[i];
      sum_n += w * along[i];
    }
    sum = warp_sum(sum);
    sum_n = warp_sum(sum_n);
    if (lane == 0) own[group] = make_float2(sum, sum_n);
  }
  cluster_arrive();
  cluster_wait();
  float size = static_cast<float>(pixels) * per_group;
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    float2 part = lane < place.ranks ? read_peer(own + group, lane) : make_float2(0.0f, 0.0f);
    float sum = warp_sum(part.x), sum_n = warp_sum(part.y);
    if (lane == 0) whole[group] = make_float2(sum / size, sum_n / size);
  }
  cluster_arrive(); // this block reads its peers no more
  __syncthreads();
  if (dx.first && place.row >= 0) {
    float mean_g[V], mean_gn[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float2 means = whole[(place.column * V + i) / per_group];
      mean_g[i] = means.x;
      mean_gn[i] = means.y;
    }
    int to_stride;
    T *to = dx.column(place.pixel, c, to_stride);
    for (int p = place.row; p < place.count; p += plan.rows) {
      float n[V], g[V];
      recompute(p, n, g);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = scale[i] * (g[i] * weights[i] - mean_g[i] - n[i] * mean_gn[i]);
      store<V>(to + static_cast<int64_t>(p) * to_stride, g);
    }
  }
  cluster_wait(); // a block stays until its peers have read it
}

// Whether the kernel may be launched as it needs: asked once a kernel.
template <class... Parameters>
bool allowed(void (*kernel)(Parameters...), int &cached) {
  int known = __atomic_load_n(&cached, __ATOMIC_RELAXED);
  if (known == 0) {
    known = has_dependent_launch() && // compute capability 9 or above
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared) == cudaSuccess &&
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess
                ? 1
                : -1;
    if (known < 0) cudaGetLastError(); // the error is answered by the other path
    __atomic_store_n(&cached, known, __ATOMIC_RELAXED);
  }
  return known > 0;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const ResidentPlan &plan, int64_t batch, int sets, cudaStream_t stream,
           Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.cluster, sets, static_cast<unsigned>(batch));
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Calls `f` with the Kind and the plan to use, of 16 bytes a pack where that makes a full plan, else of 8; -1 where none.
template <class F>
int with_plan(const GroupNormCall &call, bool aligned_pointers, int inputs, F f) {
  auto fits = [&](int vector) { return call.channels1 % vector == 0 && call.channels2 % vector == 0; };
  if (!aligned_pointers || !fits(4) || !has_dependent_launch()) return -1;
  if (call.dtype == 0) {
    ResidentPlan plan(call, 4, inputs);
    return plan.cluster ? f(Kind<float, 4>{}, plan) : -1;
  }
  bool bf16 = call.dtype == 1;
  if (!bf16 && call.dtype != 2) return -1;
  ResidentPlan half(call, 4, inputs);
  if (fits(8)) {
    ResidentPlan plan(call, 8, inputs);
    if (plan.cluster && (plan.full || !half.full))
      return bf16 ? f(Kind<__nv_bfloat16, 8>{}, plan) : f(Kind<__half, 8>{}, plan);
  }
  if (!half.cluster) return -1;
  return bf16 ? f(Kind<__nv_bfloat16, 4>{}, half) : f(Kind<__half, 4>{}, half);
}

} // namespace

int64_t lcm::resident_parts(int64_t batch) { return batch * kMostCluster; }

int lcm::resident_forward(const GroupNormCall &call, void *y, float *mean, float *rstd, float eps, cudaStream_t stream) {
  bool alike = aligned(call.x1, call.x2, call.weight, call.bias, y);
  return with_plan(call, alike, 1, [&](auto kind, const ResidentPlan &plan) {
    using T = typename decltype(kind)::type;
    auto kernel = forward<T, decltype(kind)::width>;
    static int cached = 0;
    if (!allowed(kernel, cached)) return -1;
    Joined<const T> x{(const T *)call.x1, (const T *)call.x2, call.channels1, call.channels2};
    return launch(kernel, plan, call.batch, call.groups / plan.groups, stream, x, (const T *)call.weight,
                  (const T *)call.bias, (T *)y, mean, rstd, plan, call.pixels, call.groups, eps, call.activation);
  });
}

int lcm::resident_backward(const GroupNormCall &call, const float *mean, const float *rstd, const void *dy, void *dx1,
                           void *dx2, float *by_channel, int *parts, cudaStream_t stream) {
  bool alike = aligned(call.x1, call.x2, call.weight, call.bias, dy, dx1, dx2);
  return with_plan(call, alike, 2, [&](auto kind, const ResidentPlan &plan) {
    using T = typename decltype(kind)::type;
    auto kernel = backward<T, decltype(kind)::width>;
    static int cached = 0;
    if (!allowed(kernel, cached)) return -1;
    Joined<const T> x{(const T *)call.x1, (const T *)call.x2, call.channels1, call.channels2};
    Joined<T> dx{(T *)dx1, (T *)dx2, call.channels1, call.channels2};
    *parts = static_cast<int>(call.batch) * plan.cluster;
    return launch(kernel, plan, call.batch, call.groups / plan.groups, stream, x, (const T *)dy, (const T *)call.weight,
                  (const T *)call.bias, mean, rstd, dx, plan, call.pixels, call.groups, call.activation, by_channel);
  });
}
