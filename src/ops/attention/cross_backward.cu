// The gradients of cross-attention to text and image tokens. All scores of a query fit the registers of a warp, so its row dots (the sum over the keys of
// weight * gradient of the weight) come from the weights themselves: the forward pass need not keep the two softmaxes' outputs apart.
#include "cross.cuh"

namespace cross {

enum Term { TEXT_TERM = 0, IMAGE_TERM = 1 };

struct Backward {
  LcmAttentionGradient g; // k, v: text; k2, v2: image tokens
  float image_scale;
  const float *lse[2];
  float *row_dots[2]; // (batch, heads, tokens) of each term; null where no later kernel reads them
  float *partials[2]; // (batch, heads, groups of 16 keys, shares, {dk, dv}, 16, 64); null where not wanted
  int term;           // of key_gradients and add_partials
  int shares;
};

constexpr int PARTIAL = 2 * 16 * D;

// A block's shared memory before its keys: for each warp and stage q and dout (4 slots of 16 bytes a thread each), then 32 numbers of its rows.
constexpr int RING = WARPS * STAGES * 8 * 32, RING_BYTES = RING * 16 + WARPS * STAGES * 32 * 4;
struct Ring {
  uint4 *slots;
  float *numbers;
  __device__ explicit Ring(unsigned char *shared) {
    const int warp = threadIdx.x / 32;
    slots = reinterpret_cast<uint4 *>(shared) + warp * STAGES * 8 * 32;
    numbers = reinterpret_cast<float *>(shared + RING * 16) + warp * STAGES * 32;
  }
  // `low` and `high`: what to fetch one number a row of, at the sample's and head's first token; else infinity and `high_else`.
  template <typename T>
  __device__ __forceinline__ void fetch(int stage, const T *q, int64_t q_row, const T *dout, int64_t dout_row, const float *low, const float *high,
                                        float high_else, int first, int rows) const {
    copy_rows(slots + stage * 8 * 32, q, q_row, first, rows);
    copy_rows(slots + stage * 8 * 32 + 4 * 32, dout, dout_row, first, rows);
    const int lane = threadIdx.x % 32, row = first + lane % 16;
    const float *from = lane < 16 ? low : high;
    if (from != nullptr && row < rows) mma::copy_4(numbers + stage * 32 + lane, from + row);
    else numbers[stage * 32 + lane] = lane < 16 ? INFINITY : high_else;
  }
};

// The sums dk, dv (16 keys x 64, before scaling) a warp gathers, in the layout of products.
struct KeySums {
  float dk[D / 8][4], dv[D / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) dk[n][e] = dv[n][e] = 0.f;
  }

  // dv += weights^T dout, dk += slopes^T q; weights and slopes: 16 queries x 16 keys, packed. All four are held by rows of queries and turned in registers.
  template <typename T>
  __device__ __forceinline__ void add(const uint32_t (&weights)[2][2], const uint32_t (&slopes)[2][2], const Operand &q, const Operand &dout) {
    uint32_t w[4], s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = mma::transpose(weights[i % 2][i / 2]), s[i] = mma::transpose(slopes[i % 2][i / 2]);
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      mma::multiply<T>(dv[n], w, mma::transpose(dout.r[n / 2][n % 2 * 2]), mma::transpose(dout.r[n / 2][n % 2 * 2 + 1]));
      mma::multiply<T>(dk[n], s, mma::transpose(q.r[n / 2][n % 2 * 2]), mma::transpose(q.r[n / 2][n % 2 * 2 + 1]));
    }
  }

  // Adds the warps' sums in order of the warps and writes them, columns as in memory again. Uses the ring's memory, whose copies must have arrived.
  __device__ __forceinline__ void write(unsigned char *shared, float *partial) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *sums = reinterpret_cast<float *>(shared);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int at = warp * PARTIAL + (lane / 4 + e / 2 * 8) * D + n / 4 * 32 + lane % 4 * 8 + n % 4 * 2 + e % 2;
        sums[at] = dk[n][e], sums[at + PARTIAL / 2] = dv[n][e];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < PARTIAL; i += THREADS) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[w * PARTIAL + i];
      partial[i] = sum;
    }
  }
};
static_assert(WARPS * PARTIAL * 4 <= RING * 16, "the warps' sums fit the ring");

// One term's share of dq (16 x 64, before scaling): from q and dout of 16 queries, the weights p = exp(scale q k^T - lse), the row dots sum(p * dp) with
// dp = factor dout v^T, the slopes p * (dp - row dot), and sums += slopes k. Gives weights and slopes, packed, and the row dots.
template <typename T, int GROUPS>
__device__ __forceinline__ void add_term(float (&sums)[D / 8][4], uint32_t (&weights)[2 * GROUPS][2], uint32_t (&slopes)[2 * GROUPS][2], float (&dots)[2],
                                         const Operand &q, const Operand &dout, const T *keys, const T *values, int count, float scale, float factor,
                                         float lse_low, float lse_high) {
  float products[2 * GROUPS][4];
  dot_keys<T, GROUPS>(products, q, keys);
  const float shift[2] = {lse_low * mma::LOG2_E, lse_high * mma::LOG2_E};
#pragma unroll
  for (int n = 0; n < 2 * GROUPS; n++) {
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      p[e] = mma::exp2_fast(products[n][e] * (scale * mma::LOG2_E) - shift[e / 2]);
      if (n * 8 + 8 > count && n * 8 + threadIdx.x % 4 * 2 + e % 2 >= count) p[e] = 0.f;
    }
    weights[n][0] = mma::pack<T>(p[0], p[1]), weights[n][1] = mma::pack<T>(p[2], p[3]);
  }
  dot_keys<T, GROUPS>(products, dout, values);
  dots[0] = dots[1] = 0.f;
#pragma unroll
  for (int n = 0; n < 2 * GROUPS; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 p = mma::unpack<T>(weights[n][half]);
      products[n][2 * half] *= factor, products[n][2 * half + 1] *= factor;
      dots[half] += p.x * products[n][2 * half] + p.y * products[n][2 * half + 1];
    }
  dots[0] = sum_of_row(dots[0]), dots[1] = sum_of_row(dots[1]);
#pragma unroll
  for (int n = 0; n < 2 * GROUPS; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 p = mma::unpack<T>(weights[n][half]);
      slopes[n][half] = mma::pack<T>(p.x * (products[n][2 * half] - dots[half]), p.y * (products[n][2 * half + 1] - dots[half]));
    }
  add_weighted<T, GROUPS>(sums, slopes, keys);
}

// dq (batch, tokens, heads * 64), with up to 16 TEXT and 16 IMAGE keys; with IMAGE 1 also the block's partial sums of dk2, dv2, so that one pass over q and
// dout makes all a training step of SDXL asks for; else the row dots, for key_gradients. Grid: (shares of the queries, heads, batch).
template <typename T, int TEXT, int IMAGE> __global__ void __launch_bounds__(THREADS, 2) query_gradients(const __grid_constant__ Backward call) {
  constexpr int TEXT_SIZE = TEXT * 16 * STRIDE<D>, IMAGE_SIZE = IMAGE * 16 * STRIDE<D>;
  constexpr bool FUSED = IMAGE == 1;
  const LcmAttention &a = call.g.forward;
  extern __shared__ __align__(16) unsigned char shared[];
  const int head = blockIdx.y, sample = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = head * D;
  const Ring ring(shared);
  T *keys = reinterpret_cast<T *>(shared + RING_BYTES), *values = keys + TEXT_SIZE;
  T *image_keys = values + TEXT_SIZE, *image_values = image_keys + IMAGE_SIZE;

  const Share share(a.tokens);
  const int64_t rows = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens;
  const bool image = portable::sees_reference(a, sample);
  const T *q = static_cast<const T *>(a.q) + sample * a.q_batch + column, *dout = static_cast<const T *>(call.g.dout) + sample * a.out_batch + column;
  T *dq = static_cast<T *>(call.g.dq) + sample * call.g.dq_batch + column;
  auto fetch = [&](int stage, int tile) {
    ring.fetch(stage, q, a.q_row, dout, a.out_row, call.lse[TEXT_TERM] + rows, image ? call.lse[IMAGE_TERM] + rows : nullptr, INFINITY, tile * ROWS,
               a.tokens);
  };
  copy_keys<T, TEXT>(keys, a.k, sample * a.k_batch + column, a.k_row, a.own_tokens);
  copy_keys<T, TEXT>(values, a.v, sample * a.v_batch + column, a.v_row, a.own_tokens);
  if (image) {
    const int from = a.reference_batch == 1 ? 0 : sample;
    copy_keys<T, IMAGE>(image_keys, a.k2, from * a.k2_batch + column, a.k2_row, a.reference_tokens);
    copy_keys<T, IMAGE>(image_values, a.v2, from * a.v2_batch + column, a.v2_row, a.reference_tokens);
  }
  mma::commit();
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
    const int tile = share.begin + warp + stage * WARPS;
    if (tile < share.end) fetch(stage, tile);
    mma::commit();
  }
  mma::wait<STAGES>();
  renumber<T, 2 * (TEXT + IMAGE)>(keys);
  __syncthreads();

  KeySums gathered;
  if constexpr (FUSED) gathered.clear();
  int stage = 0;
  for (int tile = share.begin + warp; tile < share.end; tile += WARPS) {
    mma::wait<STAGES - 1>();
    __syncwarp();
    const Operand queries = read_rows(ring.slots + stage * 8 * 32), douts = read_rows(ring.slots + stage * 8 * 32 + 4 * 32);
    float lse[4];
#pragma unroll
    for (int i = 0; i < 4; i++) lse[i] = ring.numbers[stage * 32 + lane / 4 + i * 8];
    __syncwarp();
    if (tile + STAGES * WARPS < share.end) fetch(stage, tile + STAGES * WARPS);
    mma::commit();
    stage = (stage + 1) % STAGES;

    const int row = tile * ROWS + lane / 4;
    auto write_dots = [&](float *to, const float(&dots)[2]) {
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (to != nullptr && lane % 4 == 0 && row + half * 8 < a.tokens) to[rows + row + half * 8] = dots[half];
    };
    float sums[D / 8][4] = {}, dots[2];
    {
      uint32_t weights[2 * TEXT][2], slopes[2 * TEXT][2];
      add_term<T, TEXT>(sums, weights, slopes, dots, queries, douts, keys, values, a.own_tokens, a.scale, 1.f, lse[0], lse[1]);
      write_dots(call.row_dots[TEXT_TERM], dots);
    }
    if (image) {
      uint32_t weights[2 * IMAGE][2], slopes[2 * IMAGE][2];
      add_term<T, IMAGE>(sums, weights, slopes, dots, queries, douts, image_keys, image_values, a.reference_tokens, a.scale, call.image_scale, lse[2], lse[3]);
      if constexpr (FUSED) {
        if (call.partials[IMAGE_TERM] != nullptr) gathered.add<T>(weights, slopes, queries, douts);
      } else {
        write_dots(call.row_dots[IMAGE_TERM], dots);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[n][e] *= a.scale;
    if (call.g.dq != nullptr) write_rows(sums, dq, call.g.dq_row, tile * ROWS, a.tokens);
  }
  if constexpr (FUSED) {
    if (call.partials[IMAGE_TERM] == nullptr) return;
    mma::wait<0>();
    const int64_t block = (static_cast<int64_t>(sample) * a.heads + head) * gridDim.x + blockIdx.x;
    gathered.write(shared, call.partials[IMAGE_TERM] + block * PARTIAL);
  }
}

// The partial sums of dk, dv of 16 keys of one term over a share of the queries, for what query_gradients does not gather itself: text, or more than 16 image
// tokens. Grid: (shares of the queries, heads * groups of 16 keys, batch).
template <typename T> __global__ void __launch_bounds__(THREADS, 3) key_gradients(const __grid_constant__ Backward call) {
  const LcmAttention &a = call.g.forward;
  const bool text = call.term == TEXT_TERM;
  const int count = text ? a.own_tokens : a.reference_tokens, groups = tiles_of(count, 16);
  extern __shared__ __align__(16) unsigned char shared[];
  const int head = blockIdx.y / groups, group = blockIdx.y % groups, sample = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = head * D;
  const Ring ring(shared);
  T *keys = reinterpret_cast<T *>(shared + RING_BYTES), *values = keys + 16 * STRIDE<D>;

  const bool visible = text || portable::sees_reference(a, sample);
  const Share share(a.tokens);
  const int end = visible ? share.end : share.begin;
  const int64_t rows = (static_cast<int64_t>(sample) * a.heads + head) * a.tokens;
  const T *q = static_cast<const T *>(a.q) + sample * a.q_batch + column, *dout = static_cast<const T *>(call.g.dout) + sample * a.out_batch + column;
  auto fetch = [&](int stage, int tile) {
    ring.fetch(stage, q, a.q_row, dout, a.out_row, call.lse[call.term] + rows, call.row_dots[call.term] + rows, 0.f, tile * ROWS, a.tokens);
  };
  const int left = count - group * 16, from = !text && a.reference_batch == 1 ? 0 : sample;
  if (text) {
    copy_keys<T, 1>(keys, a.k, from * a.k_batch + column + group * 16 * a.k_row, a.k_row, left);
    copy_keys<T, 1>(values, a.v, from * a.v_batch + column + group * 16 * a.v_row, a.v_row, left);
  } else {
    copy_keys<T, 1>(keys, a.k2, from * a.k2_batch + column + group * 16 * a.k2_row, a.k2_row, left);
    copy_keys<T, 1>(values, a.v2, from * a.v2_batch + column + group * 16 * a.v2_row, a.v2_row, left);
  }
  mma::commit();
#pragma unroll
  for (int stage = 0; stage < STAGES; stage++) {
    const int tile = share.begin + warp + stage * WARPS;
    if (tile < end) fetch(stage, tile);
    mma::commit();
  }
  mma::wait<STAGES>();
  renumber<T, 2>(keys);
  __syncthreads();

  KeySums gathered;
  gathered.clear();
  const float factor = text ? 1.f : call.image_scale;
  int stage = 0;
  for (int tile = share.begin + warp; tile < end; tile += WARPS) {
    mma::wait<STAGES - 1>();
    __syncwarp();
    const Operand queries = read_rows(ring.slots + stage * 8 * 32), douts = read_rows(ring.slots + stage * 8 * 32 + 4 * 32);
    float numbers[4]; // lse of a thread's two rows, then their row dots
#pragma unroll
    for (int i = 0; i < 4; i++) numbers[i] = ring.numbers[stage * 32 + lane / 4 + i * 8];
    __syncwarp();
    if (tile + STAGES * WARPS < end) fetch(stage, tile + STAGES * WARPS);
    mma::commit();
    stage = (stage + 1) % STAGES;

    float products[2][4], slopes_of_weights[2][4];
    dot_keys<T, 1>(products, queries, keys);
    dot_keys<T, 1>(slopes_of_weights, douts, values);
    uint32_t weights[2][2], slopes[2][2];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float p[2], slope[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          p[e] = mma::exp2_fast(products[n][2 * half + e] * (a.scale * mma::LOG2_E) - numbers[half] * mma::LOG2_E);
          slope[e] = p[e] * (factor * slopes_of_weights[n][2 * half + e] - numbers[2 + half]);
        }
        weights[n][half] = mma::pack<T>(p[0], p[1]), slopes[n][half] = mma::pack<T>(slope[0], slope[1]);
      }
    gathered.add<T>(weights, slopes, queries, douts);
  }
  mma::wait<0>();
  const int64_t block = (static_cast<int64_t>(sample) * a.heads * groups + blockIdx.y) * gridDim.x + blockIdx.x;
  gathered.write(shared, call.partials[call.term] + block * PARTIAL);
}

// dk, dv of one term from the partial sums, added in order of the samples (of image tokens the batch shares) and the shares.
// Grid: (8, heads * groups of 16 keys, samples of the gradient); each thread makes a pair of neighbours.
template <typename T> __global__ void __launch_bounds__(THREADS) add_partials(const __grid_constant__ Backward call) {
  const LcmAttentionGradient &g = call.g;
  const LcmAttention &a = g.forward;
  const bool text = call.term == TEXT_TERM;
  const int count = text ? a.own_tokens : a.reference_tokens, groups = tiles_of(count, 16), head = blockIdx.y / groups, group = blockIdx.y % groups;
  const int i = (blockIdx.x * THREADS + threadIdx.x) * 2, key = group * 16 + i / D % 16;
  if (key >= count) return;
  const int samples = !text && a.reference_batch == 1 ? a.batch : 1;
  float low = 0.f, high = 0.f;
  for (int sample = blockIdx.z; sample < blockIdx.z + samples; sample++) {
    const float *from = call.partials[call.term] + (static_cast<int64_t>(sample) * a.heads * groups + blockIdx.y) * call.shares * PARTIAL + i;
#pragma unroll 8
    for (int share = 0; share < call.shares; share++) {
      const float2 x = *reinterpret_cast<const float2 *>(from + share * PARTIAL);
      low += x.x, high += x.y;
    }
  }
  const bool is_dk = i < PARTIAL / 2;
  const float factor = is_dk ? a.scale : text ? 1.f : call.image_scale;
  T *to = static_cast<T *>(is_dk ? (text ? g.dk : g.dk2) : (text ? g.dv : g.dv2));
  const int64_t row = is_dk ? (text ? g.dk_row : g.dk2_row) : (text ? g.dv_row : g.dv2_row);
  const int64_t batch = is_dk ? (text ? g.dk_batch : g.dk2_batch) : (text ? g.dv_batch : g.dv2_batch);
  *reinterpret_cast<uint32_t *>(to + blockIdx.z * batch + key * row + head * D + i % D) = mma::pack<T>(low * factor, high * factor);
}

inline bool wants_text(const LcmAttentionGradient &g) { return g.dk != nullptr && g.dv != nullptr; }
inline bool wants_image(const LcmAttentionGradient &g) { return g.forward.k2 != nullptr && g.dk2 != nullptr && g.dv2 != nullptr; }

// Lays a call's workspace out from `memory` on and returns its end: the row dots and the partial sums of the terms that need them.
inline uintptr_t lay_out(Backward &call, uintptr_t memory) {
  const LcmAttentionGradient &g = call.g;
  const LcmAttention &a = g.forward;
  const int64_t heads = static_cast<int64_t>(a.batch) * a.heads;
  call.shares = shares(a, 2);
  auto take = [&](int64_t floats) {
    float *at = reinterpret_cast<float *>(memory);
    memory += (floats * sizeof(float) + 255) / 256 * 256;
    return at;
  };
  const bool wanted[2] = {wants_text(g), wants_image(g)};
  for (int term = 0; term < 2; term++) {
    const bool later = wanted[term] && (term == TEXT_TERM || !is_small(a)); // by key_gradients, from the row dots
    call.row_dots[term] = later ? take(heads * a.tokens) : nullptr;
    call.partials[term] =
        wanted[term] ? take(heads * tiles_of(term == TEXT_TERM ? a.own_tokens : a.reference_tokens, 16) * call.shares * PARTIAL) : nullptr;
  }
  return memory;
}

template <typename T, int TEXT, int IMAGE> int launch_query_gradients(const Backward &call, cudaStream_t stream) {
  const LcmAttention &a = call.g.forward;
  const size_t shared = RING_BYTES + 2 * 16 * (TEXT + IMAGE) * STRIDE<D> * sizeof(T);
  return portable::launch(query_gradients<T, TEXT, IMAGE>, dim3(call.shares, a.heads, a.batch), THREADS, shared, call, stream);
}

template <typename T> int backward(Backward &call, cudaStream_t stream) {
  const LcmAttention &a = call.g.forward;
  int status = is_small(a) ? launch_query_gradients<T, 5, 1>(call, stream) : launch_query_gradients<T, 8, 8>(call, stream);
  for (int term = 0; term < 2; term++) {
    call.term = term;
    const int groups = tiles_of(term == TEXT_TERM ? a.own_tokens : a.reference_tokens, 16);
    if (status == 0 && call.row_dots[term] != nullptr)
      status = portable::launch(key_gradients<T>, dim3(call.shares, a.heads * groups, a.batch), THREADS, RING_BYTES + 2 * 16 * STRIDE<D> * sizeof(T), call,
                                stream);
    if (status == 0 && call.partials[term] != nullptr)
      status = portable::launch(add_partials<T>, dim3(PARTIAL / 2 / THREADS, a.heads * groups, term == TEXT_TERM ? a.batch : a.reference_batch), THREADS, 0,
                                call, stream);
  }
  return status;
}

} // namespace cross

extern "C" size_t lcm_cross_attention_backward_workspace(const LcmAttentionGradient *call) {
  cross::Backward argument{*call};
  return cross::lay_out(argument, 0);
}

// `call`'s k2, v2, dk2, dv2 are the image tokens'; its lse is the text's, and out is not read. Any of dq, dk and dv, dk2 and dv2 may be null. Always
// deterministic. -1: as lcm_cross_attention_forward.
extern "C" int lcm_cross_attention_backward(const LcmAttentionGradient *call, float image_scale, const float *lse_image, cudaStream_t stream) {
  using namespace cross;
  const LcmAttentionGradient &g = *call;
  const LcmAttention &a = g.forward;
  using portable::in_sixteens;
  if (!cross::is_supported(a) || !in_sixteens(g.dout, 0, 0) || (g.dq != nullptr && !in_sixteens(g.dq, g.dq_row, g.dq_batch)) ||
      (wants_text(g) && !(in_sixteens(g.dk, g.dk_row, g.dk_batch) && in_sixteens(g.dv, g.dv_row, g.dv_batch))) ||
      (wants_image(g) && !(in_sixteens(g.dk2, g.dk2_row, g.dk2_batch) && in_sixteens(g.dv2, g.dv2_row, g.dv2_batch))))
    return -1;
  if (g.workspace_bytes < lcm_cross_attention_backward_workspace(call) || a.lse == nullptr || (a.k2 != nullptr && lse_image == nullptr))
    return cudaErrorInvalidValue;
  Backward argument{g, image_scale, {a.lse, lse_image}};
  lay_out(argument, reinterpret_cast<uintptr_t>(g.workspace));
  return a.dtype == portable::BF16 ? backward<__nv_bfloat16>(argument, stream) : backward<__half>(argument, stream);
}
