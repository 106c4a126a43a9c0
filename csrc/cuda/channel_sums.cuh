// Sums over every position of a channel: a and g of N samples, C channels and P positions in, [N, C] out.
//
// A reduction too long for its share of the device is split; the parts go to a buffer of partial sums, and a second
// kernel adds them in order. No atomics: the same input gives the same bits.
#pragma once

#include "../math.h"
#include "elements.cuh"
#include "plan_channel_sums.cuh"

namespace fastscore::cuda {

// What a kernel reduces: kSums accumulators, and how one pair of elements enters them.
struct Dot {
  static constexpr int kSums = 1;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    sum[0] += a * g;
  }
};

struct Sums {
  static constexpr int kSums = 3;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    sum[0] += a * g;
    sum[1] += a;
    sum[2] += g;
  }
};

struct Powers {
  static constexpr int kSums = 2;
  template <class S>
  static FASTSCORE_HD void add(S (&sum)[kSums], S a, S g) {
    const S product = a * g;
    sum[0] += product < 0 ? -product : product;
    sum[1] += product * product;
  }
};

// Where one kernel writes: sum k of row n·C + c goes to sums[k][split · split_stride + row].
template <class S, int kSums>
struct Outputs {
  S* sums[kSums];
  int64_t split_stride;
};

// Adds the pairs that load(i, &a, &g) gives for i = lane, lane + lanes, ... below length, over kWidth accumulators.
template <class Reducer, int kWidth, class S, class Load>
__device__ __forceinline__ void add_elements(S (&sum)[kWidth][Reducer::kSums], int64_t length, int lane, int lanes,
                                             Load load) {
  for (int64_t base = lane; base < length; base += int64_t(kWidth) * lanes) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int64_t i = base + int64_t(j) * lanes;
      S a = 0, g = 0;
      if (i < length) load(i, &a, &g);
      Reducer::add(sum[j], a, g);
    }
  }
}

template <class Reducer, class T, class S, int kSize>
__device__ __forceinline__ void add_loaded(S (&sum)[kSize][Reducer::kSums], const Pack<T>& a, const Pack<T>& g) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) Reducer::add(sum[j], widen(a.value[j]), widen(g.value[j]));
}

template <class Reducer, class T, class S>
__device__ __forceinline__ void add_loaded(S (&sum)[1][Reducer::kSums], T a, T g) {
  Reducer::add(sum[0], widen(a), widen(g));
}

// The lane's share of a contiguous run: single elements up to a 16-byte boundary, packs, single elements.
template <class Reducer, class T, class S>
__device__ __forceinline__ void add_run(S (&sum)[Pack<T>::kSize][Reducer::kSums], const T* a, const T* g,
                                        int64_t length, int lane, int lanes) {
  const auto add_range = [&](int64_t begin, int64_t end) {
    add_elements<Reducer>(sum, end - begin, lane, lanes, [=](int64_t i, S* x, S* y) {
      *x = load(a + begin + i);
      *y = load(g + begin + i);
    });
  };
  constexpr int kSize = Pack<T>::kSize;
  const int64_t head = elements_to_boundary(a, g, length);
  add_range(0, head);
  const int64_t packed = (length - head) / kSize * kSize, step = int64_t(lanes) * kSize;
  const T *pack_a = a + head, *pack_g = g + head;
  int64_t i = int64_t(lane) * kSize;
  for (; i + step < packed; i += 2 * step) {
    const Pack<T> a0 = load_pack(pack_a + i), g0 = load_pack(pack_g + i);
    const Pack<T> a1 = load_pack(pack_a + i + step), g1 = load_pack(pack_g + i + step);
    add_loaded<Reducer>(sum, a0, g0);
    add_loaded<Reducer>(sum, a1, g1);
  }
  if (i < packed) add_loaded<Reducer>(sum, load_pack(pack_a + i), load_pack(pack_g + i));
  add_range(head + packed, length);
}

// Ends the kernels whose lanes share a row: everything into accumulator 0, then over the lanes, then out.
template <class Reducer, int kWidth, class S>
__device__ __forceinline__ void finish_row(S (&sum)[kWidth][Reducer::kSums], bool write, int64_t row, int lanes,
                                           const Outputs<S, Reducer::kSums>& out) {
#pragma unroll
  for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
#pragma unroll
      for (int k = 0; k < Reducer::kSums; ++k) sum[j][k] += sum[j + width][k];
    }
  }
  sum_over_lanes(sum[0], lanes);
  if (!write) return;
#pragma unroll
  for (int k = 0; k < Reducer::kSums; ++k) out.sums[k][blockIdx.y * out.split_stride + row] = sum[0][k];
}

template <class Reducer, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    sum_rows(const T* a, const T* g, Geometry it, Outputs<Sum<T>, Reducer::kSums> out) {
  const int lane = threadIdx.x & (it.lanes - 1);
  const int64_t row = int64_t(blockIdx.x) * (kThreads / it.lanes) + threadIdx.x / it.lanes;
  const bool inside = row < it.samples * it.channels;
  Sum<T> sum[Pack<T>::kSize][Reducer::kSums] = {};
  if (inside) {
    const int64_t n = divide(row, it.channels), c = row - n * it.channels;
    const int64_t begin = blockIdx.y * it.split.segment;
    add_run<Reducer>(sum, a + n * it.sample.a + c * it.channel.a + begin,
                     g + n * it.sample.g + c * it.channel.g + begin, min(it.split.segment, it.positions - begin), lane,
                     it.lanes);
  }
  finish_row<Reducer>(sum, inside && lane == 0, row, it.lanes, out);
}

template <class Reducer, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    sum_strided(const T* a, const T* g, Geometry it, Walk walk, Outputs<Sum<T>, Reducer::kSums> out) {
  using S = Sum<T>;
  const int lane = threadIdx.x & (it.lanes - 1);
  const int64_t row = int64_t(blockIdx.x) * (kThreads / it.lanes) + threadIdx.x / it.lanes;
  const bool inside = row < it.samples * it.channels;
  S sum[kStridedWidth][Reducer::kSums] = {};
  if (inside) {
    const int64_t n = divide(row, it.channels), c = row - n * it.channels;
    const T* row_a = a + n * it.sample.a + c * it.channel.a;
    const T* row_g = g + n * it.sample.g + c * it.channel.g;
    const int64_t begin = blockIdx.y * it.split.segment;
    add_elements<Reducer>(sum, min(it.split.segment, it.positions - begin), lane, it.lanes, [&](int64_t i, S* x, S* y) {
      const Strides at = offset(walk, begin + i);
      *x = load(row_a + at.a);
      *y = load(row_g + at.g);
    });
  }
  finish_row<Reducer>(sum, inside && lane == 0, row, it.lanes, out);
}

// kSize channels to a thread: a Pack's, or 1 where the channels do not fill aligned packs.
template <class Reducer, class T, int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    sum_columns(const T* a, const T* g, Geometry it, Outputs<Sum<T>, Reducer::kSums> out) {
  using S = Sum<T>;
  constexpr int kSums = Reducer::kSums;
  const int samples_of_block = kThreads / it.channel_lanes / it.lanes, width = it.channel_lanes * kSize;
  const int tiles = int((it.channels + width - 1) / width), tile = blockIdx.x % tiles;
  const int64_t first_sample = int64_t(blockIdx.x / tiles) * samples_of_block;
  const int64_t first_channel = int64_t(tile) * width;
  const int x = threadIdx.x & (it.channel_lanes - 1), y = threadIdx.x / it.channel_lanes & (it.lanes - 1);
  const int64_t n = first_sample + threadIdx.x / it.channel_lanes / it.lanes, c = first_channel + x * kSize;

  S sum[kSize][kSums] = {};
  if (n < it.samples && c < it.channels) {
    const T *from_a = a + n * it.sample.a + c, *from_g = g + n * it.sample.g + c;
    const int64_t begin = blockIdx.y * it.split.segment, end = min(begin + it.split.segment, it.positions);
    const auto load_at = [&](const T* from, int64_t stride, int64_t p) {
      if constexpr (kSize == 1) return __ldg(from + p * stride);
      else return load_pack(from + p * stride);
    };
    int64_t p = begin + y;
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

  // [sum][sample and lane][channel of the tile]: written by who summed, read by who adds the lanes up.
  __shared__ S part[kSums * kSize * kThreads];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) part[(k * kThreads + threadIdx.x) * kSize + j] = sum[j][k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < samples_of_block * width; i += kThreads) {
    const int z = i / width, column = i % width;
    const int64_t sample = first_sample + z, channel = first_channel + column;
    if (sample >= it.samples || channel >= it.channels) continue;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const S* lane = part + k * kThreads * kSize + z * it.lanes * width + column;
      S total = 0;
      for (int l = 0; l < it.lanes; ++l) total += lane[l * width];
      out.sums[k][blockIdx.y * out.split_stride + sample * it.channels + channel] = total;
    }
  }
}

// partials: [split][sum][row] -> [row] for every sum; four accumulators keep the loads of one thread in flight.
template <class S, int kSums>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    add_partials(const S* partials, int64_t splits, int64_t rows, Outputs<S, kSums> out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const S* part = partials + k * rows + row;
    S total[4] = {};
    for (int64_t split = 0; split < splits; split += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] += split + j < splits ? part[(split + j) * kSums * rows] : S(0);
    }
    out.sums[k][row] = (total[0] + total[1]) + (total[2] + total[3]);
  }
}

// Every launch of one op, in order; launch(kernel, blocks, splits, arguments...) is the device's or a test's.
// partials: splits · kSums · N · C elements where the reduction is split, else unused.
template <class Reducer, class T, class Launch>
void launch_channel_sums(const ChannelPlan& plan, const T* a, const T* g, Sum<T>* const (&sums)[Reducer::kSums],
                         Sum<T>* partials, Launch launch) {
  using S = Sum<T>;
  constexpr int kSums = Reducer::kSums;
  const Geometry& it = plan.geometry;
  const int64_t rows = it.samples * it.channels;
  if (rows == 0) return;
  Outputs<S, kSums> result{{}, 0}, first{{}, kSums * rows};
  for (int k = 0; k < kSums; ++k) {
    result.sums[k] = sums[k];
    first.sums[k] = partials + k * rows;
  }
  const Outputs<S, kSums>& out = it.split.splits == 1 ? result : first;
  switch (it.layout) {
    case Layout::rows: launch(sum_rows<Reducer, T>, it.blocks, it.split.splits, a, g, it, out); break;
    case Layout::strided: launch(sum_strided<Reducer, T>, it.blocks, it.split.splits, a, g, it, plan.walk, out); break;
    case Layout::columns:
      if (it.wide) launch(sum_columns<Reducer, T, Pack<T>::kSize>, it.blocks, it.split.splits, a, g, it, out);
      else launch(sum_columns<Reducer, T, 1>, it.blocks, it.split.splits, a, g, it, out);
  }
  if (it.split.splits == 1) return;
  launch(add_partials<S, kSums>, ceil_divide(rows, kThreads), int64_t(1), static_cast<const S*>(partials),
         it.split.splits, rows, result);
}

}  // namespace fastscore::cuda
