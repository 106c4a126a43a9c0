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
  __device__ __forceinline__ T pass(Sum<T> (&sum)[Sums::kSums], Sum<T> y, Sum<T> g, Sum<T> rest) const {
    Sums::add(sum, y, g);
    return narrow<T>(y <= low || y >= high ? Sum<T>(0) : g + rest);
  }
};

template <bool kRest, class T>
__device__ __forceinline__ void pass_element(Sum<T> (&sum)[Sums::kSums], const Bounds<T>& bounds, const T* y, T* g,
                                             const T* rest) {
  // no -0.0 comes of adding -0.0
  *g = bounds.pass(sum, load(y), widen(__ldcg(g)), kRest ? load(rest) : Sum<T>(-0.0));
}

// What one 16-byte load brings of each tensor.
template <bool kRest, class T>
struct ClampPacks {
  Pack<T> y, g, rest;

  __device__ __forceinline__ void load(const T* from_y, const T* from_g, const T* from_rest) {
    y = load_pack(from_y);
    g = load_pack_to_change(from_g);
    if constexpr (kRest) rest = load_pack(from_rest);
  }

  template <int kWidth>
  __device__ __forceinline__ void pass(Sum<T> (&sum)[kWidth][Sums::kSums], const Bounds<T>& bounds, T* to) {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      g.value[j] = bounds.pass(sum[j % kWidth], widen(y, j), widen(g, j), kRest ? widen(rest, j) : Sum<T>(-0.0));
    }
    store_pack(to, g);
  }
};

// Packs of each tensor that a lane of clamp_rows has in flight, as far as registers go.
template <bool kRest>
inline constexpr int kHeldToClamp = kRest ? 2 : 3;

template <bool kRest, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    clamp_rows(const T* y, ClampBackward<T> task, Geometry it, Outputs<Sum<T>> out) {
  constexpr int kHeld = kHeldToClamp<kRest>, kEdges = sizeof(T) == 8 ? 1 : 3;
  const RowPart at(it);
  Sum<T> sum[kRowWidth<T>][Sums::kSums] = {};
  if (at.inside) {
    const Bounds<T> bounds(task);
    const T *from = y + at.start.a, *rest = kRest ? task.rest + at.start.a : nullptr;
    T* to = task.g + at.start.a;
    int head = int(elements_to_boundary(from, to, at.length));
    if (kRest && elements_to_boundary(from, rest, at.length) != head) head = at.length;
    const Run<T> run(head, at.length);
    const int packs = run.packed / Pack<T>::kSize;
    int pack = at.lane, edges = run.edges;
    do {
      ClampPacks<kRest, T> held[kHeld];
      const int first = run.head + pack * Pack<T>::kSize, step = it.lanes * Pack<T>::kSize;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int i = first + j * step;
        if (pack + j * it.lanes < packs) held[j].load(from + i, to + i, rest + i);
      }
      for (int number = at.lane; number < edges; number += kEdges * it.lanes) {
        Sum<T> of_y[kEdges], of_g[kEdges], of_rest[kEdges];
#pragma unroll
        for (int j = 0; j < kEdges; ++j) {
          if (number + j * it.lanes >= edges) continue;
          const int i = run.edge(number + j * it.lanes);
          of_y[j] = load(from + i);
          of_g[j] = widen(__ldcg(to + i));
          of_rest[j] = kRest ? load(rest + i) : Sum<T>(-0.0);
        }
#pragma unroll
        for (int j = 0; j < kEdges; ++j) {
          if (number + j * it.lanes >= edges) continue;
          to[run.edge(number + j * it.lanes)] = bounds.pass(sum[j % kRowWidth<T>], of_y[j], of_g[j], of_rest[j]);
        }
      }
      edges = 0;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (pack + j * it.lanes < packs) held[j].pass(sum, bounds, to + first + j * step);
      }
      pack += kHeld * it.lanes;
    } while (pack < packs);
  }
  finish_row<Sums>(sum, at, it.lanes, out);
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
      else {
        ClampPacks<kRest, T> packs;
        packs.load(from + i, to + i, rest + i);
        packs.pass(sum, bounds, to + i);
      }
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
