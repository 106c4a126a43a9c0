// Where a kernel's threads go: plain host arithmetic on sizes and strides, so that it can be read and tested alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math.h"
#include "elements.cuh"

namespace fastscore::cuda {

inline constexpr int kMaxDims = 64;
inline constexpr int kBlocksPerMultiprocessor = 4;  // blocks of 256 threads that keep one multiprocessor busy
inline constexpr double kFull = 0.9;                // of the places of all waves, filled: more is not sought
inline constexpr int kShortestChain = 4;            // additions per accumulator below which a split does not pay
inline constexpr int kShortestSegment = 256;  // elements; the partial sums of shorter ones would add to the traffic
inline constexpr int kLongestChain = 1024;    // additions per accumulator above which float32 would lose too much
inline constexpr int64_t kMaxSplits = 65535;  // what a grid's second dimension may be

// Element strides of one dimension in two tensors of one shape.
struct Strides {
  int64_t a, g;
};

// The dimensions of two tensors that are walked together, outermost first; neighbours that step alike are one.
struct Walk {
  int dims = 0;
  int64_t size[kMaxDims];
  Strides stride[kMaxDims];

  FASTSCORE_HD bool contiguous() const { return dims == 0 || (dims == 1 && stride[0].a == 1 && stride[0].g == 1); }
};

// Sorts a dimension in by falling stride; size 1 falls out. False where the walk is full.
inline bool add_dimension(Walk& walk, int64_t size, Strides stride) {
  if (size == 1) return true;
  if (walk.dims == kMaxDims) return false;
  int at = walk.dims++;
  for (; at > 0 && walk.stride[at - 1].a + walk.stride[at - 1].g < stride.a + stride.g; --at) {
    walk.size[at] = walk.size[at - 1];
    walk.stride[at] = walk.stride[at - 1];
  }
  walk.size[at] = size;
  walk.stride[at] = stride;
  return true;
}

inline void merge_neighbours(Walk& walk) {
  int last = 0;
  for (int d = 1; d < walk.dims; ++d) {
    const bool one = walk.stride[last].a == walk.stride[d].a * walk.size[d] &&
                     walk.stride[last].g == walk.stride[d].g * walk.size[d];
    if (!one) ++last;
    walk.size[last] = one ? walk.size[last] * walk.size[d] : walk.size[d];
    walk.stride[last] = walk.stride[d];
  }
  walk.dims = std::min(walk.dims, last + 1);
}

inline int64_t ceil_divide(int64_t number, int64_t divisor) { return (number + divisor - 1) / divisor; }

inline int power_of_two_from(int64_t least, int limit) {
  int power = 1;
  while (power < least && power < limit) power *= 2;
  return power;
}

// Where element i of a walk lies.
__device__ __forceinline__ Strides offset(const Walk& walk, int64_t i) {
  Strides at{0, 0};
  for (int d = walk.dims - 1; d > 0; --d) {
    const int64_t outer = divide(i, walk.size[d]), index = i - outer * walk.size[d];
    at.a += index * walk.stride[d].a;
    at.g += index * walk.stride[d].g;
    i = outer;
  }
  return {at.a + i * walk.stride[0].a, at.g + i * walk.stride[0].g};
}

// A reduction of `length` elements cut into `splits` segments.
struct Split {
  int64_t segment, splits;
};

// How much of the time that `blocks` take, in waves of `places` at once, a place is filled.
inline double fill(int64_t blocks, int64_t places) {
  return blocks == 0 ? 1 : double(blocks) / double(ceil_divide(blocks, places) * places);
}

// `step` elements are one addition for every accumulator; `blocks` would run without a split, `places` at once. The
// fewest splits that fill the waves.
inline Split split_reduction(int64_t length, int64_t step, int64_t blocks, int64_t places) {
  const auto cut = [&](int64_t splits) {
    const int64_t segment = std::max<int64_t>(ceil_divide(ceil_divide(length, splits), step) * step, step);
    return Split{segment, std::max<int64_t>(ceil_divide(length, segment), 1)};
  };
  blocks = std::max<int64_t>(blocks, 1);
  const int64_t useful = length / std::max<int64_t>(step * kShortestChain, kShortestSegment);
  const int64_t needed = std::min(std::max<int64_t>(ceil_divide(length, step * kLongestChain), 1), kMaxSplits);
  const int64_t of_one_wave = places / blocks;
  const int64_t most = std::min({std::max(useful, needed), std::max(needed, 4 * (of_one_wave + 1)), kMaxSplits});
  Split best = cut(needed);
  // below one wave in eight, a single wave is full enough, and the search would be long
  for (int64_t splits = of_one_wave >= 8 ? std::clamp(of_one_wave, needed, most) : needed; splits <= most; ++splits) {
    const Split next = cut(splits);
    if (fill(blocks * next.splits, places) > fill(blocks * best.splits, places)) best = next;
    if (fill(blocks * best.splits, places) >= kFull || of_one_wave >= 8) break;
  }
  return best;
}

}  // namespace fastscore::cuda
