// How the kernels of group normalisation split a picture among blocks, and the reductions they share.
//
// A block takes all channels of a chunk of pixels. A thread keeps to one pack of channels, so what belongs to channels
// stays in registers, and a row of threads reads adjacent addresses. Groups need not be whole packs (SDXL: 10 channels
// a group, 8 a pack): sums are taken per channel, and channels are gathered to groups once a block. There is about one
// block a multiprocessor over the whole batch: the partial sums of a sample's chunks, which each block of the second
// kernel adds up for itself, stay few.
#pragma once
#include "../activation/activation.cuh"
#include "../elements.cuh"

namespace lcm {

constexpr int kNormThreads = 640;   // divides into whole rows for 320, 640, 1280 and 2560 channels of 2 bytes
constexpr int kNormUnroll = 4;      // packs in flight a thread
constexpr int kMostChannels = 3072; // of which the per-channel sums fit in 48 KiB of shared memory

struct NormPlan {
  int columns;       // packs a row of threads covers at once
  int rows;          // pixels a block treats at once
  int threads;       // rows * columns, rounded up to warps
  int chunks;        // blocks a sample
  int64_t per_chunk; // pixels in each but the last

  NormPlan(int64_t batch, int64_t pixels, int channels, int vector) {
    int packs = channels / vector;
    columns = packs < kNormThreads ? packs : kNormThreads;
    rows = kNormThreads / columns;
    threads = divide_up(rows * columns, 32) * 32;
    int64_t wanted = multiprocessors() / batch, most = divide_up<int64_t>(pixels, rows);
    int64_t count = wanted < most ? wanted : most;
    if (count < 1) count = 1;
    per_chunk = divide_up<int64_t>(pixels, count);
    chunks = static_cast<int>(divide_up<int64_t>(pixels, per_chunk));
  }
};

// Whether the kernels take these arguments.
inline bool takes(int64_t batch, int64_t pixels, int channels1, int channels2, int groups, int activation) {
  int channels = channels1 + channels2;
  return batch >= 1 && batch <= 65535 && pixels >= 1 && pixels < (1ll << 31) && channels1 >= 1 && channels2 >= 0 &&
         channels <= kMostChannels && groups >= 1 && channels % groups == 0 && is_activation(activation);
}

// One or two tensors (batch, pixels, channels1 or channels2) that are one on the channel axis.
template <class T>
struct Joined {
  T *first, *second;
  int channels1, channels2;

  // The channel of pixel 0 of a sample, and the distance to the next pixel.
  __device__ __forceinline__ T *column(int64_t sample_pixel, int channel, int &stride) const {
    if (channel < channels1) {
      stride = channels1;
      return first + sample_pixel * channels1 + channel;
    }
    stride = channels2;
    return second + sample_pixel * channels2 + (channel - channels1);
  }
};

// The groups of V channels from c on, by one division.
template <int V>
__device__ __forceinline__ void groups_of(int c, int per_group, int (&groups)[V]) {
  int group = c / per_group, left = (group + 1) * per_group - c; // left: channels of this group from here on
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (left == 0) {
      ++group;
      left = per_group;
    }
    groups[i] = group;
    --left;
  }
}

// The sums over a block's rows of what threads hold for V channels each: calls finish(channel, sum). `scratch`: V floats
// a thread. Channels start at `base`; thread (row, column) holds those of pack `column`. As many threads as there are
// share a sum, in a fixed order.
template <int V, class F>
__device__ __forceinline__ void sum_rows(const float (&values)[V], float *scratch, int rows, int columns, int base,
                                         int channels, F finish) {
#pragma unroll
  for (int i = 0; i < V; ++i) scratch[i * blockDim.x + threadIdx.x] = values[i];
  int sharing = 1;
  while (sharing < 32 && 2 * sharing * columns * V <= blockDim.x) sharing *= 2;
  __syncthreads();
  for (int start = 0; start < columns * V * sharing; start += blockDim.x) { // whole warps stay: they shuffle
    int index = start + threadIdx.x, j = index / sharing, i = j / columns, column = j - i * columns;
    float sum = 0.0f;
    if (i < V) {
#pragma unroll 4
      for (int row = index % sharing; row < rows; row += sharing) sum += scratch[i * blockDim.x + row * columns + column];
    }
    for (int distance = sharing / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    int channel = base + column * V + i;
    if (i < V && index % sharing == 0 && channel < channels) finish(channel, sum);
  }
  __syncthreads();
}

} // namespace lcm
