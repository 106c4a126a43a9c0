// What the kernels whose lanes share a row have in common: which part of which row a thread has, where its 16-byte
// loads begin and end, and how the sums of its lanes become one.
#pragma once

#include "elements.cuh"
#include "plan_channel_sums.cuh"

namespace fastscore::cuda {

// Packs of two tensors that a lane has in flight, as far as registers go.
template <class T>
inline constexpr int kHeldPairs = sizeof(T) == 8 ? 2 : 3;

// Accumulators of a lane for each sum: enough for short chains, and few enough to leave registers to loads.
template <class T>
inline constexpr int kRowWidth = sizeof(T) == 8 ? 1 : 4;

// Where one kernel writes: sum k of row n·C + c goes to sums[(split · kSums + k) · rows + row].
template <class S>
struct Outputs {
  S* sums;
  int64_t rows;
  S divisor;  // of the sum that is a mean

  template <class Reducer>
  __device__ __forceinline__ void store(int64_t split, int k, int64_t row, S value) const {
    sums[(split * Reducer::kSums + k) * rows + row] = k == Reducer::kMean ? value / divisor : value;
  }
};

// The part of a row that a thread's lanes share.
struct RowPart {
  int64_t row;
  Strides start;  // elements from the tensors' first
  int lane, length;
  bool inside;

  __device__ __forceinline__ explicit RowPart(const Geometry& it) : lane(threadIdx.x & (it.lanes - 1)) {
    const int bits = __ffs(it.lanes) - 1;  // lanes are a power of two, which the compiler cannot know
    row = int64_t(blockIdx.x) * (kThreads >> bits) + (threadIdx.x >> bits);
    inside = row < it.samples * it.channels;
    const int64_t begin = blockIdx.y * it.split.segment;
    const int64_t n = it.even ? 0 : divide(row, it.channels), c = row - n * it.channels;
    start = {n * it.sample.a + c * it.channel.a + begin, n * it.sample.g + c * it.channel.g + begin};
    length = int(min(it.split.segment, it.positions - begin));
  }
};

// A run of elements: `head` single ones up to a 16-byte boundary, `packed` in packs, and single ones again. The single
// ones are numbered together.
template <class T>
struct Run {
  int head, packed, edges;

  __device__ __forceinline__ Run(int before_boundary, int length) : head(before_boundary) {
    packed = (length - head) / Pack<T>::kSize * Pack<T>::kSize;
    edges = length - packed;
  }
  __device__ __forceinline__ int edge(int number) const { return number < head ? number : number + packed; }
};

// Adds up the lanes' sums, and calls store(k, sum) once for each of a row. Each of the first steps halves the number of
// sums that a lane holds, as the other half goes to the lane it trades with: three sums take about as many shuffles as
// one. Every thread of the block must call it, at most once in a kernel; lanes are a power of two from kLeastLanes.
template <class S, int kCount, class Store>
__device__ __forceinline__ void store_sums(const S (&sum)[kCount], int lane, int lanes, Store store) {
  constexpr int kHeld = kCount == 3 ? 4 : kCount;
  static_assert(kHeld <= kLeastLanes && (kHeld & (kHeld - 1)) == 0);
  S value[kHeld] = {};
#pragma unroll
  for (int k = 0; k < kCount; ++k) value[k] = sum[k];
  int step = lanes < kWarp ? lanes : kWarp, mine = 0;
  const int holders = step / kHeld;  // lanes that end up with the same sum
#pragma unroll
  for (int half = kHeld / 2; half > 0; half /= 2) {
    step /= 2;
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const S given = upper ? value[k] : value[k + half];
      value[k] = (upper ? value[k + half] : value[k]) + __shfl_xor_sync(0xffffffffu, given, step);
    }
    mine += upper ? half : 0;
  }
  for (step /= 2; step > 0; step /= 2) value[0] += __shfl_xor_sync(0xffffffffu, value[0], step);
  const bool holds = mine < kCount && (threadIdx.x & (holders - 1)) == 0;
  if (lanes <= kWarp) {
    if (holds) store(mine, value[0]);
    return;
  }
  __shared__ S of_warp[kCount][kThreads / kWarp];
  const int warp = threadIdx.x / kWarp, warps = lanes / kWarp, first = warp & -warps;
  if (holds) of_warp[mine][warp] = value[0];
  __syncthreads();
  if (lane >= kCount) return;
  S total = of_warp[lane][first];
  for (int i = 1; i < warps; ++i) total += of_warp[lane][first + i];
  store(lane, total);
}

// Ends the kernels whose lanes share a row: everything into accumulator 0, then over the lanes, then out.
template <class Reducer, int kWidth, class S>
__device__ __forceinline__ void finish_row(S (&sum)[kWidth][Reducer::kSums], const RowPart& at, int lanes,
                                           const Outputs<S>& out) {
#pragma unroll
  for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
#pragma unroll
      for (int k = 0; k < Reducer::kSums; ++k) sum[j][k] += sum[j + width][k];
    }
  }
  store_sums(sum[0], at.lane, lanes, [&](int k, S total) {
    if (at.inside) out.template store<Reducer>(blockIdx.y, k, at.row, total);
  });
}

}  // namespace fastscore::cuda
