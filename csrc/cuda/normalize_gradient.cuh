// Every sample of a gradient divided by its L2 norm. A sample that fits into the registers of a block is read once; a
// longer or strided one twice, since its norm must be known before the first quotient. A thread's squares are of
// elements over a power of two near the largest, so that none overflows or vanishes; double is for what threads have in
// common, as few devices are fast at it.
#pragma once

#include "elements.cuh"
#include "geometry.cuh"

namespace fastscore::cuda {

inline constexpr int kHeldPacks = 8;  // 16-byte loads that a thread keeps in registers

struct NormalizePlan {
  bool held;  // one pass
  int64_t samples, length;
  Strides sample;  // of g and of the result
  int lanes;
  Split split;
  int64_t blocks;  // times split.splits
  Walk walk;       // within a sample, over g and the result
};

// `g` and `unit` are the addresses of gradient and result, which have the same sizes.
inline NormalizePlan plan_normalize_gradient(const void* g, const void* unit, int element_size, const int64_t* sizes,
                                             const int64_t* strides_g, const int64_t* strides_unit, int dims,
                                             int multiprocessors) {
  NormalizePlan it{};
  it.samples = sizes[0];
  it.sample = {strides_g[0], strides_unit[0]};
  it.length = 1;
  for (int d = 1; d < dims; ++d) {
    it.length *= sizes[d];
    add_dimension(it.walk, sizes[d], {strides_g[d], strides_unit[d]});
  }
  merge_neighbours(it.walk);
  const int pack = 16 / element_size;
  const int64_t packs = ceil_divide(it.length, pack), apart = it.samples > 1 ? it.sample.a - it.sample.g : 0;
  const bool in_step =
      (reinterpret_cast<uintptr_t>(g) - reinterpret_cast<uintptr_t>(unit)) % 16 == 0 && apart % pack == 0;
  it.held = it.walk.contiguous() && in_step && packs <= kThreads * kHeldPacks;
  it.lanes = it.held ? std::max(power_of_two_from(ceil_divide(packs, 4), kThreads), kWarp) : kThreads;
  const auto blocks = [&it] { return ceil_divide(it.samples, kThreads / it.lanes); };
  while (it.lanes < std::min<int64_t>(packs, kThreads) && blocks() < multiprocessors) it.lanes *= 2;
  it.blocks = blocks();
  it.split = it.held ? Split{it.length, 1}
                     : split_reduction(it.length, int64_t(kThreads) * pack, it.blocks,
                                       int64_t(multiprocessors) * kBlocksPerMultiprocessor);
  return it;
}

// 1 / max(norm, eps); 0 where that maximum is 0, or so small that its inverse is infinite. NaN stays NaN.
__device__ __forceinline__ double inverse_length(double norm, double eps) {
  const double divisor = norm < eps ? eps : norm;
  return divisor < 0x1p-1022 ? 0 : 1 / divisor;
}

// 2 to a power within the range of normal float32.
__device__ __forceinline__ float power_of_two(int exponent) {
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The exponent of a float32 that is not negative; -127 below the normal range.
__device__ __forceinline__ int exponent_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return int(bits >> 23) - 127;
}

__device__ __forceinline__ float magnitude(float x) { return x < 0 ? -x : x; }

// What elements are multiplied by: two powers of two, neither of which takes a digit from a result in the normal range,
// and a number from 1 to 2, in two parts, so that a product is rounded once.
template <class S>
struct Factor {
  S first = 1, second = 1, rest, less = 0;

  __device__ __forceinline__ explicit Factor(double factor) : rest(S(factor)) {
    if constexpr (std::is_same_v<S, float>) {
      if (!(factor > 0)) return;  // 0 and NaN
      uint64_t bits;
      memcpy(&bits, &factor, sizeof(bits));
      const int exponent = min(max(int(bits >> 52) - 1023, -200), 200);
      first = power_of_two(exponent / 2);
      second = power_of_two(exponent - exponent / 2);
      // what dividing by the two gives, exactly
      const double exact = factor * power_of_two(-(exponent / 2)) * power_of_two(exponent / 2 - exponent);
      rest = float(exact);
      less = float(exact - double(rest));
    }
  }

  template <class T>
  __device__ __forceinline__ T scaled(T x) const {
    const S near_one = widen(x) * first * second;
    if constexpr (std::is_same_v<S, double>) return narrow<T>(near_one * rest);
    else return narrow<T>(fmaf(near_one, rest, near_one * less));
  }

  template <class T>
  __device__ __forceinline__ Pack<T> scaled(Pack<T> pack) const {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack.value[j] = scaled(pack.value[j]);
    return pack;
  }
};

// The squares of what one thread reads, over kSize accumulators.
template <class S, int kSize>
struct Squares {
  S sum[kSize] = {};

  __device__ __forceinline__ void add(int j, S x) { sum[j] += x * x; }
  template <class T>
  __device__ __forceinline__ void add(const Pack<T>& pack) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) add(j, widen(pack.value[j]));
  }
  __device__ __forceinline__ double total() const {
    double total = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) total += sum[j];
    return total;
  }
};

template <int kSize>
struct Squares<float, kSize> {
  float sum[kSize] = {}, scale = 1, most = 0;  // sums of (x · scale)² for |x| <= most

  // Largest magnitude of what comes next; NaN is seen in the sums.
  __device__ __forceinline__ void expect(float largest) {
    if (!(largest > most)) return;
    const int exponent = min(max(exponent_of(largest), -126), 126);
    const float next = power_of_two(-exponent), change = next / scale;
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = sum[j] * change * change;
    scale = next;
    most = largest * 0x1p20f;  // whose square is far from overflow: few are the changes
  }
  __device__ __forceinline__ void add(int j, float x) {
    expect(magnitude(x));
    sum[j] += (x * scale) * (x * scale);
  }
  template <class T>
  __device__ __forceinline__ void add(const Pack<T>& pack) {
    float largest = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) largest = max(largest, magnitude(widen(pack.value[j])));
    expect(largest);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float x = widen(pack.value[j]) * scale;
      sum[j] += x * x;
    }
  }
  __device__ __forceinline__ double total() const {
    float total = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) total += sum[j];
    const double inverse = power_of_two(-exponent_of(scale));
    return double(total) * inverse * inverse;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_held(const T* g, NormalizePlan it, double eps, T* unit, Sum<T>* norm) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x & (it.lanes - 1);
  const int64_t n = int64_t(blockIdx.x) * (kThreads / it.lanes) + threadIdx.x / it.lanes;
  const bool inside = n < it.samples;
  const T* from = g + n * it.sample.a;
  T* to = unit + n * it.sample.g;
  const int64_t head = elements_to_boundary(from, to, it.length), packs = inside ? (it.length - head) / kSize : 0;
  // Elements before the first and after the last pack: fewer than lanes, so one each.
  const int64_t edge_at = lane < head ? lane : lane + packs * kSize;
  const bool has_edge = inside && edge_at < it.length;

  Squares<Sum<T>, kSize> of_thread;
  Pack<T> held[kHeldPacks];
#pragma unroll
  for (int i = 0; i < kHeldPacks; ++i) {
    const int64_t at = lane + int64_t(i) * it.lanes;
    if (at < packs) held[i] = load_pack(from + head + at * kSize);
  }
  T edge{};
  if (has_edge) {
    edge = __ldg(from + edge_at);
    of_thread.add(0, widen(edge));
  }
#pragma unroll
  for (int i = 0; i < kHeldPacks; ++i) {
    if (lane + int64_t(i) * it.lanes < packs) of_thread.add(held[i]);
  }
  double squares[1] = {of_thread.total()};
  sum_over_lanes(squares, it.lanes);

  const double length = sqrt(squares[0]);
  const Factor<Sum<T>> factor(inverse_length(length, eps));
  if (inside && lane == 0) norm[n] = Sum<T>(length);
#pragma unroll
  for (int i = 0; i < kHeldPacks; ++i) {
    const int64_t at = lane + int64_t(i) * it.lanes;
    if (at < packs) store_pack(to + head + at * kSize, factor.scaled(held[i]));
  }
  if (has_edge) to[edge_at] = factor.scaled(edge);
}

// Calls on_pack(from, to) or on_element(from, to) for this thread's share of the block's segment of sample n.
template <class T, class OnPack, class OnElement>
__device__ __forceinline__ void for_segment(const T* g, T* unit, const NormalizePlan& it, int64_t n, OnPack on_pack,
                                            OnElement on_element) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t begin = blockIdx.y * it.split.segment, length = min(it.split.segment, it.length - begin);
  const T* from = g + n * it.sample.a;
  T* to = unit + n * it.sample.g;
  if (!it.walk.contiguous()) {
    for (int64_t i = threadIdx.x; i < length; i += kThreads) {
      const Strides at = offset(it.walk, begin + i);
      on_element(from + at.a, to + at.g);
    }
    return;
  }
  from += begin;
  to += begin;
  const int64_t head = elements_to_boundary(from, to, length), packed = head + (length - head) / kSize * kSize;
  for (int64_t i = threadIdx.x; i < head; i += kThreads) on_element(from + i, to + i);
#pragma unroll 2
  for (int64_t i = head + int64_t(threadIdx.x) * kSize; i < packed; i += kThreads * kSize) on_pack(from + i, to + i);
  for (int64_t i = packed + threadIdx.x; i < length; i += kThreads) on_element(from + i, to + i);
}

// partials: [N, splits]
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sum_squares(const T* g, T* unit, NormalizePlan it, double* partials) {
  Squares<Sum<T>, Pack<T>::kSize> of_thread;
  for_segment(
      g, unit, it, blockIdx.x, [&](const T* from, T*) { of_thread.add(load_pack(from)); },
      [&](const T* from, T*) { of_thread.add(0, load(from)); });
  double squares[1] = {of_thread.total()};
  sum_over_lanes(squares, kThreads);
  if (threadIdx.x == 0) partials[blockIdx.x * it.split.splits + blockIdx.y] = squares[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scale(const T* g, NormalizePlan it, double eps, const double* partials, T* unit, Sum<T>* norm) {
  double squares[1] = {0};
  for (int64_t i = threadIdx.x; i < it.split.splits; i += kThreads) {
    squares[0] += partials[blockIdx.x * it.split.splits + i];
  }
  sum_over_lanes(squares, kThreads);
  const double length = sqrt(squares[0]);
  const Factor<Sum<T>> factor(inverse_length(length, eps));
  if (blockIdx.y == 0 && threadIdx.x == 0) norm[blockIdx.x] = Sum<T>(length);
  for_segment(
      g, unit, it, blockIdx.x, [&](const T* from, T* to) { store_pack(to, factor.scaled(load_pack(from))); },
      [&](const T* from, T* to) { *to = factor.scaled(__ldg(from)); });
}

// partials: N · splits elements unless the plan is held; launch as for launch_channel_sums.
template <class T, class Launch>
void launch_normalize_gradient(const NormalizePlan& it, const T* g, double eps, T* unit, Sum<T>* norm, double* partials,
                               Launch launch) {
  if (it.samples == 0) return;
  if (it.held) {
    launch(normalize_held<T>, it.blocks, it.split.splits, g, it, eps, unit, norm);
    return;
  }
  launch(sum_squares<T>, it.blocks, it.split.splits, g, unit, it, partials);
  launch(scale<T>, it.blocks, it.split.splits, g, it, eps, static_cast<const double*>(partials), unit, norm);
}

}  // namespace fastscore::cuda
