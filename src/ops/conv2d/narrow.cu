// 3 x 3 convolutions of stride 1 between a picture of up to 4 channels (RGB, latents) and many channels: the first and
// last layers of autoencoders and U-Nets, and the gradients of their inputs. bf16 and f16, sm_80 and newer.
//
// Patches in memory (im2col) would be 9 times the many-channel picture: 2.4 GB for 1024 x 1024 pixels of 128 channels. Here
// a block brings its pixels and their neighbours to shared memory once and multiplies them from there (mma.sync), so both
// directions are bound by reading or writing the many-channel picture once.
//
// The gradient of the input is the same convolution with mirrored taps, padding 2 - padding, and the weights read with
// their two channel dimensions exchanged.
#include "../attention/mma.cuh"
#include "../elements.cuh"
#include "conv2d.h"

namespace {

constexpr int kTaps = 9, kFew = 4;
constexpr int kTile = 16;           // a block makes 16 x 16 pixels
constexpr int kHalo = kTile + 2;    // and reads so many rows and columns
constexpr int kThreads = 256;       // each of 8 warps makes 2 rows of pixels

struct Shape {
  int height, width, out_height, out_width, padding;
  int many, few; // channels
};

// Where the weight between channel `many` and channel `few` under a tap lies.
struct Weights {
  const void *data;
  int64_t many_stride, few_stride, tap_stride;
  bool mirrored;
  template <class T> __device__ __forceinline__ T at(int many, int few, int tap) const {
    return static_cast<const T *>(data)[many * many_stride + few * few_stride + (mirrored ? kTaps - 1 - tap : tap) * tap_stride];
  }
};

template <class T> __device__ __forceinline__ uint32_t pair(T low, T high) {
  return static_cast<uint32_t>(*reinterpret_cast<uint16_t *>(&high)) << 16 | *reinterpret_cast<uint16_t *>(&low);
}

// The block's corner, by (tiles across, tiles down, sample).
struct Place {
  int x, y;
  int64_t sample;
  __device__ __forceinline__ Place() : x(blockIdx.x * kTile), y(blockIdx.y * kTile), sample(blockIdx.z) {}
};

// ---- many channels to few ----

constexpr int kDepth = 64;                               // channels brought at a time: rows of 128 bytes
constexpr int kStage = kHalo * kHalo * kDepth;           // numbers of a stage
constexpr int kSteps = kDepth / 16;
constexpr int kFragments = kTaps * kSteps * 32;          // of 2 registers
constexpr int kToFewBytes = kStage * 2 + kFragments * 8;

// x: (batch, height, width, many), y: (batch, out_height, out_width, few). Products of 16 pixels by 16 channels with 16 x 8,
// of which up to 4 columns are used: reading shared memory is what counts, not the products.
template <class T> __global__ void __launch_bounds__(kThreads, 2) to_few(const T *x, Weights weights, const T *bias, T *y, Shape s) {
  extern __shared__ __align__(128) char memory[];
  T *pixels = reinterpret_cast<T *>(memory);
  uint2 *fragments = reinterpret_cast<uint2 *>(memory + kStage * 2);
  const Place place;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sums[2][4] = {};
  lcm::wait_for_previous();
  const T *sample = x + place.sample * s.height * s.width * s.many;
  for (int first = 0; first < s.many; first += kDepth) {
    if (first > 0) __syncthreads(); // the stage has been read
    for (int i = threadIdx.x; i < kHalo * kHalo * (kDepth / 8); i += kThreads) {
      const int pixel = i / (kDepth / 8), part = i % (kDepth / 8);
      const int py = place.y + pixel / kHalo - s.padding, px = place.x + pixel % kHalo - s.padding, channel = first + part * 8;
      const bool inside = py >= 0 && py < s.height && px >= 0 && px < s.width && channel < s.many;
      const T *from = inside ? sample + (static_cast<int64_t>(py) * s.width + px) * s.many + channel : x;
      // The parts of a pixel's row are exchanged by its place, so that eight pixels side by side are read without conflicts.
      const uint32_t to = mma::shared_address(pixels + pixel * kDepth + (part ^ (pixel & 7)) * 8);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    for (int i = threadIdx.x; i < kFragments; i += kThreads) {
      const int column = i % 32 / 4, tap = i / 32 / kSteps, channel = first + i / 32 % kSteps * 16 + i % 4 * 2;
      auto weight = [&](int c) { return column < s.few && c < s.many ? weights.at<T>(c, column, tap) : T(0.0f); };
      fragments[i] = make_uint2(pair(weight(channel), weight(channel + 1)), pair(weight(channel + 8), weight(channel + 9)));
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint2 b = fragments[(tap * kSteps + step) * 32 + lane];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int pixel = (warp * 2 + row + tap / 3) * kHalo + lane % 16 + tap % 3;
          uint32_t a[4];
          mma::load_matrices(a, pixels + pixel * kDepth + ((step * 2 + lane / 16) ^ (pixel & 7)) * 8);
          mma::multiply<T>(sums[row], a, b.x, b.y);
        }
      }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = t * 2 + i % 2, py = place.y + warp * 2 + row, px = place.x + g + i / 2 * 8;
      if (channel >= s.few || py >= s.out_height || px >= s.out_width) continue;
      const float offset = bias ? static_cast<float>(bias[channel]) : 0.0f;
      y[((place.sample * s.out_height + py) * s.out_width + px) * s.few + channel] = T(sums[row][i] + offset);
    }
}

// ---- few channels to many ----

constexpr int kColumns = 64; // output channels of a block, so that their weights stay in registers

// x: (batch, height, width, few), y: (batch, out_height, out_width, many). The sum runs over 9 taps of 4 channels, padded to 48.
// A block makes 64 channels (blockIdx.y) of many tiles, so that their weights are read once.
template <class T> __global__ void __launch_bounds__(kThreads, 1) from_few(const T *x, Weights weights, const T *bias, T *y, Shape s, int tiles_x, int tiles_y, int tiles) {
  __shared__ uint2 pixels[kHalo * kHalo];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.y * kColumns;
  const uint32_t *halves = reinterpret_cast<const uint32_t *>(pixels);
  // Column n of product j is channel 32 (j / 4) + 8 (n / 2) + 2 (j % 4) + n % 2: of four products a thread then holds 8
  // channels side by side.
  uint32_t b[3][8][2];
  float offsets[2][8];
  lcm::wait_for_previous();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int channel = first + j / 4 * 32 + g / 2 * 8 + j % 4 * 2 + g % 2;
#pragma unroll
    for (int step = 0; step < 3; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tap = step * 4 + half * 2 + t / 2, few = t % 2 * 2;
        auto weight = [&](int c) { return tap < kTaps && c < s.few && channel < s.many ? weights.at<T>(channel, c, tap) : T(0.0f); };
        b[step][j][half] = pair(weight(few), weight(few + 1));
      }
  }
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = first + part * 32 + t * 8 + i;
      offsets[part][i] = bias && channel < s.many ? static_cast<float>(bias[channel]) : 0.0f;
    }
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int tile_x = tile % tiles_x * kTile, tile_y = tile / tiles_x % tiles_y * kTile;
    const int64_t index = tile / tiles_x / tiles_y;
    const T *sample = x + index * s.height * s.width * s.few;
    __syncthreads(); // the tile before has been read
    for (int pixel = threadIdx.x; pixel < kHalo * kHalo; pixel += kThreads) {
      const int py = tile_y + pixel / kHalo - s.padding, px = tile_x + pixel % kHalo - s.padding;
      const bool inside = py >= 0 && py < s.height && px >= 0 && px < s.width;
      T values[kFew];
#pragma unroll
      for (int c = 0; c < kFew; ++c)
        values[c] = inside && c < s.few ? sample[(static_cast<int64_t>(py) * s.width + px) * s.few + c] : T(0.0f);
      pixels[pixel] = make_uint2(pair(values[0], values[1]), pair(values[2], values[3]));
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int line = warp * 2 + row;
      float sums[8][4] = {};
#pragma unroll
      for (int step = 0; step < 3; ++step) {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int tap = step * 4 + half * 2 + t / 2;
          const int pixel = (line + tap / 3) * kHalo + g + tap % 3;
          a[half * 2] = tap < kTaps ? halves[pixel * 2 + t % 2] : 0;
          a[half * 2 + 1] = tap < kTaps ? halves[(pixel + 8) * 2 + t % 2] : 0;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) mma::multiply<T>(sums[j], a, b[step][j][0], b[step][j][1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int py = tile_y + line, px = tile_x + g + half * 8;
        if (py >= s.out_height || px >= s.out_width) continue;
        T *to = y + ((index * s.out_height + py) * s.out_width + px) * s.many + first + t * 8;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          if (first + part * 32 + t * 8 >= s.many) continue;
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            words[j] = mma::pack<T>(sums[part * 4 + j][half * 2] + offsets[part][j * 2], sums[part * 4 + j][half * 2 + 1] + offsets[part][j * 2 + 1]);
          *reinterpret_cast<uint4 *>(to + part * 32) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
}

template <class T> int launch_to_few(dim3 grid, const void *x, Weights weights, const void *bias, void *y, const Shape &s, cudaStream_t stream) {
  static bool ready[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return -1;
  if (!__atomic_load_n(&ready[device], __ATOMIC_ACQUIRE)) {
    if (cudaFuncSetAttribute(to_few<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kToFewBytes) != cudaSuccess) return cudaGetLastError();
    __atomic_store_n(&ready[device], true, __ATOMIC_RELEASE);
  }
  return lcm::launch_dependent(to_few<T>, grid, dim3(kThreads), kToFewBytes, stream, (const T *)x, weights, (const T *)bias, (T *)y, s);
}

template <class T> int launch_from_few(dim3 grid, const void *x, Weights weights, const void *bias, void *y, const Shape &s, cudaStream_t stream) {
  const int64_t tiles = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (tiles > INT32_MAX) return -1;
  // A tile is little work beside reading the weights, so no more blocks than run at a time (two a multiprocessor).
  const int slabs = lcm::divide_up(s.many, kColumns), side = lcm::divide_up(2 * lcm::multiprocessors(), slabs);
  const dim3 blocks(static_cast<unsigned>(tiles < side ? tiles : side), slabs);
  return lcm::launch_dependent(from_few<T>, blocks, dim3(kThreads), 0, stream, (const T *)x, weights, (const T *)bias, (T *)y, s, static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(tiles));
}

// y = convolution of x, of `from` channels, with weights (output channels, 9 taps, input channels); `gradient`: x is the
// gradient of the output, y becomes that of the input.
int run(int batch, int height, int width, int from, int to, int padding, bool gradient, const void *x, const void *weight, const void *bias, void *y, int dtype, cudaStream_t stream) {
  if (dtype != 1 && dtype != 2) return -1;
  const bool narrows = to <= kFew;
  Shape s{height, width, height + 2 * padding - 2, width + 2 * padding - 2, padding, narrows ? from : to, narrows ? to : from};
  if (padding < 0 || padding > 2 || s.few < 1 || s.few > kFew || s.many <= kFew || s.many % 8 || batch < 1 || batch > 65535) return -1;
  if (s.out_height < 1 || s.out_width < 1 || s.out_height > kTile * 65535 || !lcm::aligned(narrows ? x : y)) return -1;
  // Of the weights as stored, (output, tap, input): which of the two the many channels are.
  const bool many_are_input = narrows != gradient;
  const int inner = many_are_input ? s.many : s.few;
  Weights weights{weight, many_are_input ? 1 : static_cast<int64_t>(kTaps) * inner, many_are_input ? static_cast<int64_t>(kTaps) * inner : 1, inner, gradient};
  dim3 grid(lcm::divide_up(s.out_width, kTile), lcm::divide_up(s.out_height, kTile), batch);
  if (narrows) return dtype == 1 ? launch_to_few<__nv_bfloat16>(grid, x, weights, bias, y, s, stream) : launch_to_few<__half>(grid, x, weights, bias, y, s, stream);
  return dtype == 1 ? launch_from_few<__nv_bfloat16>(grid, x, weights, bias, y, s, stream) : launch_from_few<__half>(grid, x, weights, bias, y, s, stream);
}

} // namespace

extern "C" int lcm_conv2d_forward_narrow(const LcmConv2d *c, cudaStream_t stream) {
  if (c->kernel != 3 || c->stride != 1 || c->padding_end != c->padding || c->per_sample_bias || c->residual || c->rectified) return -1;
  return run(c->batch, c->height, c->width, c->input_channels, c->output_channels, c->padding, false, c->x, c->weight, c->bias, c->y, c->dtype, stream);
}

extern "C" int lcm_conv2d_input_gradient_narrow(const LcmConv2dInputGradient *c, cudaStream_t stream) {
  if (c->kernel != 3 || c->stride != 1 || c->padding_end != c->padding || c->residual || c->gate) return -1;
  const int height = c->height + 2 * c->padding - 2, width = c->width + 2 * c->padding - 2; // of dy
  return run(c->batch, height, width, c->output_channels, c->input_channels, 2 - c->padding, true, c->dy, c->weight, nullptr, c->dx, c->dtype, stream);
}
