// How channel_sums is launched, from sizes, strides and addresses.
//
// Three layouts. `rows`: the positions of a channel are contiguous; neighbouring threads share a row. `columns`: the
// channels of a position are contiguous; every thread owns the channels of one 16-byte load. `strided`: everything
// else, element by element.
#pragma once

#include "geometry.cuh"

namespace fastscore::cuda {

enum class Layout : int { rows, columns, strided };

struct Geometry {
  Layout layout;
  bool wide;  // columns: 16-byte loads; rows find out for themselves
  int64_t samples, channels, positions;
  Strides sample, channel, position;
  int lanes;          // threads of a block that share one reduction
  int channel_lanes;  // columns: threads of a block along the channels
  Split split;
  int64_t blocks;  // times split.splits
};

inline constexpr int kStridedWidth = 4;  // accumulators of a thread that loads single elements

struct ChannelPlan {
  Geometry geometry;
  Walk walk;  // the positions
};

struct Operands {
  const void *a, *g;
  int element_size;
};

inline void plan_rows(Geometry& it, int pack, int64_t wanted) {
  it.lanes = power_of_two_from(ceil_divide(ceil_divide(it.positions, pack), 4), kThreads);
  it.blocks = ceil_divide(it.samples * it.channels, kThreads / it.lanes);
  it.split = split_reduction(it.positions, int64_t(it.lanes) * pack, it.blocks, wanted);
}

// A tile is as wide as a warp, or down to a cache line's 128 bytes where wider ones would leave the device idle.
inline void plan_columns(Geometry& it, int pack, int64_t wanted) {
  const int64_t vectors = it.wide ? it.channels / pack : it.channels;
  const int narrowest = it.wide ? 8 : kWarp;
  for (it.channel_lanes = power_of_two_from(vectors, kWarp);; it.channel_lanes /= 2) {
    it.lanes = power_of_two_from(ceil_divide(it.positions, 4), std::min(kThreads / it.channel_lanes, kWarp));
    const int64_t samples_of_block = kThreads / it.channel_lanes / it.lanes;
    it.blocks = ceil_divide(vectors, it.channel_lanes) * ceil_divide(it.samples, samples_of_block);
    if (it.blocks >= wanted || it.channel_lanes <= narrowest) break;
  }
  it.split = split_reduction(it.positions, it.lanes, it.blocks, wanted);
}

// Eight lanes to a row and so 32 rows to a block: where one tensor has its positions contiguous and the other its
// channels, the block reads whole 32-byte sectors of both.
inline void plan_strided(Geometry& it, int64_t wanted) {
  it.lanes = power_of_two_from(ceil_divide(it.positions, 4), 8);
  it.blocks = ceil_divide(it.samples * it.channels, kThreads / it.lanes);
  it.split = split_reduction(it.positions, int64_t(it.lanes) * kStridedWidth, it.blocks, wanted);
}

// `sizes` and strides as the tensors have them; channel_dim in 1..dims-1; `multiprocessors` of the device.
inline ChannelPlan plan_channel_sums(Operands in, const int64_t* sizes, const int64_t* strides_a,
                                     const int64_t* strides_g, int dims, int channel_dim, int multiprocessors) {
  ChannelPlan plan{};
  Geometry& it = plan.geometry;
  it.samples = sizes[0];
  it.channels = sizes[channel_dim];
  it.sample = {strides_a[0], strides_g[0]};
  it.channel = {strides_a[channel_dim], strides_g[channel_dim]};
  it.positions = 1;
  for (int d = 1; d < dims; ++d) {
    if (d == channel_dim) continue;
    it.positions *= sizes[d];
    add_dimension(plan.walk, sizes[d], {strides_a[d], strides_g[d]});
  }
  merge_neighbours(plan.walk);
  if (plan.walk.dims == 1) it.position = plan.walk.stride[0];

  const int pack = 16 / in.element_size;
  const auto aligned = [pack, &in](const void* base, int64_t sample, int64_t position) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && sample % pack == 0 && position % pack == 0;
  };
  it.wide = it.channels % pack == 0 && aligned(in.a, it.samples > 1 ? it.sample.a : 0, it.position.a) &&
            aligned(in.g, it.samples > 1 ? it.sample.g : 0, it.position.g);
  const bool adjacent_channels = it.channels == 1 || (it.channel.a == 1 && it.channel.g == 1);
  const int64_t wanted = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  if (plan.walk.dims == 1 && plan.walk.contiguous()) {
    it.layout = Layout::rows;
    plan_rows(it, pack, wanted);
  } else if (plan.walk.dims <= 1 && adjacent_channels) {
    it.layout = Layout::columns;
    plan_columns(it, pack, wanted);
  } else {
    it.layout = Layout::strided;
    plan_strided(it, wanted);
  }
  return plan;
}

}  // namespace fastscore::cuda
