// Sums over every position of a channel: a and g of N samples, C channels and P positions in, [N, C] out.
//
// A reduction too long for its share of the device is split; the parts go to a buffer of partial sums, and a second
// kernel adds them in order. No atomics: the same input gives the same bits.
#pragma once

#include "../math.h"
#include "elements.cuh"
#include "plan_channel_sums.cuh"
#include "rows.cuh"

namespace fastscore::cuda {

// What a kernel reduces: kSums accumulators, and how one pair of elements enters them. kMean: the sum that may be asked
// for as a mean over positions; -1 for none.
struct Dot {
  static constexpr int kSums = 1, kMean = -1;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    sum[0] += a * g;
  }
};

struct Sums {
  static constexpr int kSums = 3, kMean = 1;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    sum[0] += a * g;
    sum[1] += a;
    sum[2] += g;
  }
};

struct Powers {
  static constexpr int kSums = 2, kMean = -1;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    const S product = a * g;
    sum[0] += product < 0 ? -product : product;
    sum[1] += product * product;
  }
};

// Adds the pairs that load(i, &a, &g) gives for i = lane, lane + lanes, ... below length, kAtOnce at a time.
template <class Reducer, int kAtOnce, int kWidth, class S, class Load>
__device__ __forceinline__ void add_elements(S (&sum)[kWidth][Reducer::kSums], int length, int lane, int lanes,
                                             Load load) {
  for (int base = lane; base < length; base += kAtOnce * lanes) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * lanes;
      S a = 0, g = 0;
      if (i < length) load(i, &a, &g);
      Reducer::add(sum[j % kWidth], a, g);
    }
  }
}

template <class Reducer, class T, class S, int kWidth>
__device__ __forceinline__ void add_pack(S (&sum)[kWidth][Reducer::kSums], const Pack<T>& a, const Pack<T>& g) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) Reducer::add(sum[j % kWidth], widen(a, j), widen(g, j));
}

template <class Reducer, class T, class S>
__device__ __forceinline__ void add_loaded(S (&sum)[Pack<T>::kSize][Reducer::kSums], Pack<T> a, Pack<T> g) {
  add_pack<Reducer>(sum, a, g);
}

template <class Reducer, class T, class S>
__device__ __forceinline__ void add_loaded(S (&sum)[1][Reducer::kSums], T a, T g) {
  Reducer::add(sum[0], widen(a), widen(g));
}

// The lane's share of a contiguous run: all the packs that it holds are on their way before the first is added.
template <class Reducer, class T, class S, int kWidth>
__device__ __forceinline__ void add_run(S (&sum)[kWidth][Reducer::kSums], const T* a, const T* g, int length, int lane,
                                        int lanes) {
  const Run<T> run(int(elements_to_boundary(a, g, length)), length);
  const int packs = run.packed / Pack<T>::kSize;
  const int64_t step = int64_t(lanes) * Pack<T>::kSize;
  const T *next_a = a + run.head + lane * Pack<T>::kSize, *next_g = g + run.head + lane * Pack<T>::kSize;
  constexpr int kHeld = kHeldPairs<T>, kEdges = sizeof(T) == 8 ? 1 : 3;
  int pack = lane, edges = run.edges;
  do {
    Pack<T> held_a[kHeld], held_g[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (pack + j * lanes < packs) {
        held_a[j] = load_pack(next_a);
        held_g[j] = load_pack(next_g);
      }
      next_a += step;
      next_g += step;
    }
    add_elements<Reducer, kEdges>(sum, edges, lane, lanes, [&](int number, S* x, S* y) {
      *x = load(a + run.edge(number));
      *y = load(g + run.edge(number));
    });
    edges = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (pack + j * lanes < packs) add_pack<Reducer>(sum, held_a[j], held_g[j]);
    }
    pack += kHeld * lanes;
  } while (pack < packs);
}

template <class Reducer, class T>
__global__ void __launch_bounds__(kThreads, kRowBlocksAtOnce)
    sum_rows(const T* a, const T* g, Geometry it, Outputs<Sum<T>> out) {
  const RowPart at(it);
  Sum<T> sum[kRowWidth<T>][Reducer::kSums] = {};
  if (at.inside) add_run<Reducer>(sum, a + at.start.a, g + at.start.g, at.length, at.lane, it.lanes);
  finish_row<Reducer>(sum, at, it.lanes, out);
}

template <class Reducer, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    sum_strided(const T* a, const T* g, Geometry it, Walk walk, Outputs<Sum<T>> out) {
  const RowPart at(it);
  Sum<T> sum[kStridedWidth][Reducer::kSums] = {};
  if (at.inside) {
    const int64_t begin = blockIdx.y * it.split.segment;
    const T *row_a = a + at.start.a - begin, *row_g = g + at.start.g - begin;
    add_elements<Reducer, kStridedWidth>(sum, at.length, at.lane, it.lanes, [&](int i, Sum<T>* x, Sum<T>* y) {
      const Strides from_row = offset(walk, begin + i);
      *x = load(row_a + from_row.a);
      *y = load(row_g + from_row.g);
    });
  }
  finish_row<Reducer>(sum, at, it.lanes, out);
}

// The first sample and channel of a block of columns, and those of a thread in it, which has kSize channels.
struct Column {
  int64_t first_sample, first_channel, sample, channel;
  int lane, width;  // of the tile, in channels
};

template <int kSize>
__device__ __forceinline__ Column column_of(const Geometry& it) {
  Column at;
  const int samples = kThreads / it.channel_lanes / it.lanes;
  at.width = it.channel_lanes * kSize;
  const int tiles = int((it.channels + at.width - 1) / at.width);
  at.first_sample = int64_t(blockIdx.x / tiles) * samples;
  at.first_channel = int64_t(blockIdx.x % tiles) * at.width;
  at.lane = threadIdx.x / it.channel_lanes & (it.lanes - 1);
  at.sample = at.first_sample + threadIdx.x / it.channel_lanes / it.lanes;
  at.channel = at.first_channel + (threadIdx.x & (it.channel_lanes - 1)) * kSize;
  return at;
}

// Ends the kernels whose lanes share channels: over the lanes, then out.
template <class Reducer, int kSize, class S>
__device__ __forceinline__ void finish_columns(const S (&sum)[kSize][Reducer::kSums], const Geometry& it,
                                               const Column& at, const Outputs<S>& out) {
  constexpr int kSums = Reducer::kSums;
  // [sum][sample and lane][channel of the tile]: written by who summed, read by who adds the lanes up.
  __shared__ S part[kSums * kSize * kThreads];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) part[(k * kThreads + threadIdx.x) * kSize + j] = sum[j][k];
  }
  __syncthreads();
  const int samples = kThreads / it.channel_lanes / it.lanes;
  for (int i = threadIdx.x; i < samples * at.width; i += kThreads) {
    const int z = i / at.width, column = i % at.width;
    const int64_t sample = at.first_sample + z, channel = at.first_channel + column;
    if (sample >= it.samples || channel >= it.channels) continue;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const S* lane = part + k * kThreads * kSize + z * it.lanes * at.width + column;
      S total = 0;
      for (int l = 0; l < it.lanes; ++l) total += lane[l * at.width];
      out.template store<Reducer>(blockIdx.y, k, sample * it.channels + channel, total);
    }
  }
}

// kSize channels to a thread: a Pack's, or 1 where the channels do not fill aligned packs.
template <class Reducer, class T, int kSize>
__global__ void __launch_bounds__(kThreads, kColumnBlocksAtOnce)
    sum_columns(const T* a, const T* g, Geometry it, Outputs<Sum<T>> out) {
  const Column at = column_of<kSize>(it);
  Sum<T> sum[kSize][Reducer::kSums] = {};
  if (at.sample < it.samples && at.channel < it.channels) {
    const T* from_a = a + at.sample * it.sample.a + at.channel;
    const T* from_g = g + at.sample * it.sample.g + at.channel;
    const int64_t begin = blockIdx.y * it.split.segment, end = min(begin + it.split.segment, it.positions);
    const auto load_at = [&](const T* from, int64_t stride, int64_t p) {
      if constexpr (kSize == 1) return __ldg(from + p * stride);
      else return load_pack(from + p * stride);
    };
    int64_t p = begin + at.lane;
    for (; p + it.lanes < end; p += 2 * it.lanes) {
      const auto a0 = load_at(from_a, it.position.a, p), g0 = load_at(from_g, it.position.g, p);
      const auto a1 = load_at(from_a, it.position.a, p + it.lanes), g1 = load_at(from_g, it.position.g, p + it.lanes);
      add_loaded<Reducer>(sum, a0, g0);
      add_loaded<Reducer>(sum, a1, g1);
    }
    if (p < end) {
      add_loaded<Reducer>(sum, load_at(from_a, it.position.a, p), load_at(from_g, it.position.g, p));
    }
  }

  finish_columns<Reducer, kSize>(sum, it, at, out);
}

// partials: [split][sum][row] -> [sum][row], a thread to each; eight accumulators keep its loads in flight.
template <class Reducer, class S>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    add_partials(const S* partials, int64_t splits, Outputs<S> out) {
  constexpr int kWidth = 8;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, sums = Reducer::kSums * out.rows;
  if (i >= sums) return;
  S total[kWidth] = {};
  for (int64_t split = 0; split < splits; split += kWidth) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total[j] += split + j < splits ? partials[(split + j) * sums + i] : S(0);
  }
#pragma unroll
  for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) total[j] += total[j + width];
  }
  const int k = int(i >= out.rows) + int(i >= 2 * out.rows);
  out.template store<Reducer>(0, k, i - k * out.rows, total[0]);
}

// Every launch of one op, in order; launch(kernel, blocks, splits, arguments...) is the device's or a test's.
// sums: [kSums, N, C]. partials: splits · kSums · N · C elements where the reduction is split, else unused. mean: the
// sum kMean is divided by the number of positions.
template <class Reducer, class S, class Launch, class First>
void launch_reduction(const ChannelPlan& plan, S* sums, S* partials, bool mean, Launch launch, First first) {
  const Geometry& it = plan.geometry;
  const int64_t rows = it.samples * it.channels;
  if (rows == 0) return;
  const bool split = it.split.splits > 1;
  const Outputs<S> result{sums, rows, S(mean ? std::max<int64_t>(it.positions, 1) : 1)}, parts{partials, rows, S(1)};
  first(split ? parts : result);
  if (split) {
    launch(add_partials<Reducer, S>, ceil_divide(Reducer::kSums * rows, kThreads), int64_t(1),
           static_cast<const S*>(partials), it.split.splits, result);
  }
}

// The kernels of a reduction, for whoever asks how many of their blocks run at once.
template <class Reducer, class T>
struct SumKernels {
  static constexpr auto rows = sum_rows<Reducer, T>;
  static constexpr auto strided = sum_strided<Reducer, T>;
  static constexpr auto wide = sum_columns<Reducer, T, Pack<T>::kSize>;
  static constexpr auto narrow = sum_columns<Reducer, T, 1>;
};

template <class Reducer, class T, class Launch>
void launch_channel_sums(const ChannelPlan& plan, const T* a, const T* g, Sum<T>* sums, Sum<T>* partials, bool mean,
                         Launch launch) {
  const Geometry& it = plan.geometry;
  launch_reduction<Reducer>(plan, sums, partials, mean, launch, [&](const Outputs<Sum<T>>& out) {
    const auto start = [&](auto kernel, auto... walk) {
      launch(kernel, it.blocks, it.split.splits, a, g, it, walk..., out);
    };
    switch (it.layout) {
      case Layout::rows: return start(sum_rows<Reducer, T>);
      case Layout::strided: return start(sum_strided<Reducer, T>, plan.walk);
      case Layout::columns:
        return it.wide ? start(sum_columns<Reducer, T, Pack<T>::kSize>) : start(sum_columns<Reducer, T, 1>);
    }
  });
}

}  // namespace fastscore::cuda
