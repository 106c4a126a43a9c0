// The backward pass of a clamp, together with the channel sums of what one reader sent back: y, g and rest in, the
// gradient of the clamp's input out, where g was. Every element is read, and then written, by one thread.
#pragma once

#include "channel_sums.cuh"

namespace fastscore::cuda {

// What clamp_backward_ takes besides y; all tensors have the same strides. rest may be null.
template <class T>
struct ClampBackward {
  T* g;
  const T* rest;
  double low, high;
};

// A clamp's bounds as it had them: in the dtype of its result.
template <class T>
struct Bounds {
  Sum<T> low, high;

  __device__ __forceinline__ explicit Bounds(const ClampBackward<T>& it)
      : low(widen(narrow<T>(it.low))), high(widen(narrow<T>(it.high))) {}

  // The gradient of the clamp's input; NaN in y lets it through.
  __device__ __forceinline__ T pass(Sum<T> (&sum)[Sums::kSums], T y, T g, Sum<T> rest) const {
    const Sum<T> a = widen(y), b = widen(g);
    Sums::add(sum, a, b);
    return narrow<T>(a <= low || a >= high ? Sum<T>(0) : b + rest);
  }
};

template <bool kRest, class T>
__device__ __forceinline__ void pass_element(Sum<T> (&sum)[Sums::kSums], const Bounds<T>& bounds, const T* y, T* g,
                                             const T* rest) {
  // no -0.0 comes of adding -0.0
  *g = bounds.pass(sum, __ldg(y), __ldcg(g), kRest ? load(rest) : Sum<T>(-0.0));
}

// What one thread reads at once.
template <bool kRest, class T>
struct ClampPacks {
  Pack<T> y, g, rest;

  __device__ __forceinline__ ClampPacks(const T* from_y, const T* from_g, const T* from_rest)
      : y(load_pack(from_y)), g(load_pack_to_change(from_g)), rest{} {
    if constexpr (kRest) rest = load_pack(from_rest);
  }

  __device__ __forceinline__ void pass(Sum<T> (&sum)[Pack<T>::kSize][Sums::kSums], const Bounds<T>& bounds, T* to) {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      g.value[j] = bounds.pass(sum[j], y.value[j], g.value[j], kRest ? widen(rest.value[j]) : Sum<T>(-0.0));
    }
    store_pack(to, g);
  }
};

template <bool kRest, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    clamp_rows(const T* y, ClampBackward<T> task, Geometry it, Outputs<Sum<T>> out) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x & (it.lanes - 1);
  const int64_t row = int64_t(blockIdx.x) * (kThreads / it.lanes) + threadIdx.x / it.lanes;
  const bool inside = row < it.samples * it.channels;
  Sum<T> sum[kSize][Sums::kSums] = {};
  if (inside) {
    const Bounds<T> bounds(task);
    const int64_t n = divide(row, it.channels), begin = blockIdx.y * it.split.segment;
    const int64_t at = n * it.sample.a + (row - n * it.channels) * it.channel.a + begin;
    const int64_t length = min(it.split.segment, it.positions - begin);
    const T *from = y + at, *rest = kRest ? task.rest + at : nullptr;
    T* to = task.g + at;
    int64_t head = elements_to_boundary(from, to, length);
    if (kRest && elements_to_boundary(from, rest, length) != head) head = length;
    for (int64_t i = lane; i < head; i += it.lanes) pass_element<kRest>(sum[0], bounds, from + i, to + i, rest + i);
    const int64_t packed = head + (length - head) / kSize * kSize, step = int64_t(it.lanes) * kSize;
    int64_t i = head + int64_t(lane) * kSize;
    constexpr bool kTwoAtOnce = !kRest || sizeof(T) > 2;  // else registers run out
    for (; kTwoAtOnce && i + step < packed; i += 2 * step) {
      ClampPacks<kRest, T> first(from + i, to + i, rest + i), second(from + i + step, to + i + step, rest + i + step);
      first.pass(sum, bounds, to + i);
      second.pass(sum, bounds, to + i + step);
    }
    for (; i < packed; i += step) ClampPacks<kRest, T>(from + i, to + i, rest + i).pass(sum, bounds, to + i);
    for (i = packed + lane; i < length; i += it.lanes) {
      pass_element<kRest>(sum[0], bounds, from + i, to + i, rest + i);
    }
  }
  finish_row<Sums>(sum, inside && lane == 0, row, it.lanes, out);
}

// kSize channels to a thread, as sum_columns.
template <bool kRest, class T, int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    clamp_columns(const T* y, ClampBackward<T> task, Geometry it, Outputs<Sum<T>> out) {
  const Column at = column_of<kSize>(it);
  Sum<T> sum[kSize][Sums::kSums] = {};
  if (at.sample < it.samples && at.channel < it.channels) {
    const Bounds<T> bounds(task);
    const int64_t first = at.sample * it.sample.a + at.channel, stride = it.position.a;
    const T *from = y + first, *rest = kRest ? task.rest + first : nullptr;
    T* to = task.g + first;
    const int64_t begin = blockIdx.y * it.split.segment, end = min(begin + it.split.segment, it.positions);
    for (int64_t p = begin + at.lane; p < end; p += it.lanes) {
      const int64_t i = p * stride;
      if constexpr (kSize == 1) pass_element<kRest>(sum[0], bounds, from + i, to + i, rest + i);
      else ClampPacks<kRest, T>(from + i, to + i, rest + i).pass(sum, bounds, to + i);
    }
  }
  finish_columns<Sums, kSize>(sum, it, at, out);
}

// As SumKernels; strided tensors are not taken. With rest, which needs more registers.
template <class T>
struct ClampKernels {
  static constexpr auto rows = clamp_rows<true, T>, strided = rows;
  static constexpr auto wide = clamp_columns<true, T, Pack<T>::kSize>, narrow = clamp_columns<true, T, 1>;
};

// launch, sums, partials and mean as for launch_reduction. The layout is rows or columns.
template <class T, class Launch>
void launch_clamp_backward(const ChannelPlan& plan, const T* y, const ClampBackward<T>& task, Sum<T>* sums,
                           Sum<T>* partials, bool mean, Launch launch) {
  const Geometry& it = plan.geometry;
  launch_reduction<Sums>(plan, sums, partials, mean, launch, [&](const Outputs<Sum<T>>& out) {
    const auto start = [&](auto with_rest, auto without) {
      launch(task.rest ? with_rest : without, it.blocks, it.split.splits, y, task, it, out);
    };
    constexpr int kSize = Pack<T>::kSize;
    if (it.layout == Layout::rows) start(clamp_rows<true, T>, clamp_rows<false, T>);
    else if (it.wide) start(clamp_columns<true, T, kSize>, clamp_columns<false, T, kSize>);
    else start(clamp_columns<true, T, 1>, clamp_columns<false, T, 1>);
  });
}

}  // namespace fastscore::cuda
