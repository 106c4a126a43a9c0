// The backward pass of a clamp, together with the channel sums of what one reader sent back. Compiled once per tier.
#pragma once

#include "channel_sums.h"
#include "dispatch.h"

namespace fastscore::cpu::FASTSCORE_TIER {

// A bound as the clamp had it, in the dtype of its result.
template <class T>
Sum<T> clamp_bound(double bound) {
  T element;
  from_double(bound, &element);
  return Sum<T>(to_double(element));
}

// One item of a task, and where its first element is in every operand, which all have the same strides.
template <class T>
struct ClampItem : Item<T, Sums> {
  const T* rest;
  T* out;
  Sum<T> low, high;

  ClampItem(const ClampBackward& task, int64_t item)
      : Item<T, Sums>(task.reduction, item), low(clamp_bound<T>(task.low)), high(clamp_bound<T>(task.high)) {
    const int64_t offset = this->a - static_cast<const T*>(task.reduction.a);
    rest = static_cast<const T*>(task.rest) + (task.rest ? offset : 0);
    out = static_cast<T*>(task.out) + offset;
  }

  // n elements from `at`, n up to the width: adds to the three sums, and writes the gradient of the clamp's input.
  // ahead: how many bytes further on memory is fetched already.
  template <bool Rest>
  FASTSCORE_INLINE void pass(int64_t at, int n, int64_t ahead, Vector<T>* sums) const {
    const auto some = [n](const T* p) { return n == kWidth<T> ? load(p) : load(p, n); };
    prefetch(this->a + at, ahead);
    if constexpr (Rest) prefetch(rest + at, ahead);
    __builtin_prefetch(reinterpret_cast<const char*>(out + at) + ahead, 1);  // and so g, which is there too
    const Vector<T> y = some(this->a + at), gradient = some(this->g + at);
    Sums::add(sums, y, gradient);
    const auto clamped = (y <= low) | (y >= high);
    if constexpr (Rest) {
      store_elements(out + at, clamped ? Vector<T>{} : gradient + some(rest + at), n);
    } else {
      store_unless(clamped, out + at, this->g + at, gradient, n);
    }
  }
};

template <class T, bool Rest>
void clamp_rows(const ClampItem<T>& item, const Reduction& reduction) {
  constexpr int kW = kWidth<T>, kChains = 2;
  for (int64_t c = 0; c < item.channels; ++c) {
    const int64_t row = c * reduction.channel.a;
    Vector<T> sums[kChains][3] = {};
    int64_t p = item.begin;
    for (; p + kChains * kW <= item.end; p += kChains * kW) {
      for (int chain = 0; chain < kChains; ++chain)
        item.template pass<Rest>(row + p + chain * kW, kW, kPrefetchBytes, sums[chain]);
    }
    for (; p < item.end; p += kW) {
      item.template pass<Rest>(row + p, p + kW < item.end ? kW : int(item.end - p), kPrefetchBytes, sums[0]);
    }
    for (int k = 0; k < 3; ++k) {
      Sum<T> sum = 0;
      for (int lane = 0; lane < kW; ++lane) sum += sums[0][k][lane] + sums[1][k][lane];
      item.sums[k][c] = sum;
    }
  }
}

// Sums of n channels from c on, n up to Vectors · width, over `positions` positions from `first` on.
template <int Vectors, class T, bool Rest>
FASTSCORE_INLINE void clamp_channels(const ClampItem<T>& item, int64_t stride, int64_t first, int positions, int64_t c,
                                     int n) {
  constexpr int kW = kWidth<T>;
  const int64_t ahead = positions * stride * int64_t(sizeof(T));  // the same channels of the next positions
  Vector<T> sums[Vectors][3] = {};
  for (int p = 0; p < positions; ++p) {
    for (int v = 0; v < Vectors; ++v) {
      item.template pass<Rest>((first + p) * stride + c + v * kW, Vectors == 1 ? n : kW, ahead, sums[v]);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int k = 0; k < 3; ++k) {
      Sum<T>* total = item.sums[k] + c + v * kW;
      const int some = Vectors == 1 ? n : kW;
      store_some(total, sums[v][k] + (some == kW ? load(total) : load(total, some)), some);
    }
  }
}

// Some positions at a time, and a whole cache line of each, as channel_sums walks them: sums stay in registers for that
// long, and then in the first-level cache.
template <class T, bool Rest>
void clamp_columns(const ClampItem<T>& item, const Reduction& reduction) {
  constexpr int kW = kWidth<T>, kPositions = 8;
  constexpr int kLine = 64 / sizeof(T) / kW, kVectors = kLine < 1 ? 1 : kLine > 2 ? 2 : kLine;
  const int64_t stride = reduction.positions.inner().a;
  for (int k = 0; k < 3; ++k) memset(item.sums[k], 0, item.channels * sizeof(Sum<T>));
  const auto walk = [&](int64_t first, int positions) {
    int64_t c = 0;
    for (; c + kVectors * kW <= item.channels; c += kVectors * kW) {
      clamp_channels<kVectors, T, Rest>(item, stride, first, positions, c, kVectors * kW);
    }
    for (; c + kW <= item.channels; c += kW) clamp_channels<1, T, Rest>(item, stride, first, positions, c, kW);
    if (c < item.channels) clamp_channels<1, T, Rest>(item, stride, first, positions, c, int(item.channels - c));
  };
  int64_t first = item.begin;
  for (; first + kPositions <= item.end; first += kPositions) walk(first, kPositions);
  if (first < item.end) walk(first, int(item.end - first));
}

template <class T, bool Rest>
void clamp_items(const ClampBackward& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const ClampItem<T> item(task, i);
    task.reduction.path == Path::columns ? clamp_columns<T, Rest>(item, task.reduction)
                                         : clamp_rows<T, Rest>(item, task.reduction);
  }
}

// Items [begin, end) of the task's reduction.
template <class T>
void clamp_backward(const ClampBackward& task, int64_t begin, int64_t end) {
  task.rest ? clamp_items<T, true>(task, begin, end) : clamp_items<T, false>(task, begin, end);
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
