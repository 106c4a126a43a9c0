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
  bool even;  // samples follow each other as channels do
  int64_t samples, channels, positions;
  Strides sample, channel, position;
  int lanes;          // threads of a block that share one reduction
  int channel_lanes;  // columns: threads of a block along the channels
  Split split;
  int64_t blocks;  // times split.splits
};

// How full waves of blocks have to be; a single one may be enough with fewer.
struct Enough {
  double of_waves, of_one;
};

inline constexpr Enough kEnoughRows{0.85, 0.5};  // half a wave has loads enough in flight for a device's bandwidth
inline constexpr int kLeastLanes = 4;            // of a row, so that each of its sums can end up with a lane of its own
inline constexpr int kStridedWidth = 4;          // accumulators of a thread that loads single elements

struct ChannelPlan {
  Geometry geometry;
  Walk walk;  // the positions
};

// rest: a third tensor with the strides of the two, or null.
struct Operands {
  const void *a, *g;
  int element_size;
  const void* rest = nullptr;
};

// Blocks of each kernel that run at once on the device: of sum_rows, sum_strided, and sum_columns with and without
// packs.
struct Places {
  int64_t rows, strided, wide, narrow;

  // As the kernels' launch bounds promise.
  static Places of(int64_t multiprocessors) {
    return {multiprocessors * kRowBlocksAtOnce, multiprocessors * kBlocksAtOnce, multiprocessors * kColumnBlocksAtOnce,
            multiprocessors * kColumnBlocksAtOnce};
  }
};

// The first geometry that fills its waves enough, or the one that does so best. next(): the one to try after, false at
// the end.
template <class Next>
void choose_geometry(Geometry& it, int64_t places, Enough enough, Next next) {
  const auto filled = [places](const Geometry& of) { return fill(of.blocks * of.split.splits, places); };
  const auto full = [&](const Geometry& of) {
    return filled(of) >= (of.blocks * of.split.splits <= places ? enough.of_one : enough.of_waves);
  };
  Geometry tried = it;
  while (!full(it) && next(tried)) {
    if (filled(tried) > filled(it)) it = tried;
  }
}

// Four packs to a lane, but no more than a warp to a row: what the lanes have in common costs as much for a row of one
// pack as for one of a hundred. More lanes where that fills the device better, and at last rows in parts.
inline void plan_rows(Geometry& it, int pack, int64_t places) {
  const int64_t packs = ceil_divide(it.positions, pack);
  const auto with_lanes = [=](Geometry& of, int lanes, bool whole) {
    of.lanes = lanes;
    of.blocks = ceil_divide(of.samples * of.channels, kThreads / lanes);
    of.split = split_reduction(of.positions, int64_t(lanes) * pack, of.blocks,
                               whole ? std::max<int64_t>(of.blocks, 1) : places);
  };
  const int usual = std::max(power_of_two_from(ceil_divide(packs, 4), kWarp), kLeastLanes);
  with_lanes(it, usual, true);
  const bool many = it.blocks > 3 * places;  // waves, so that filling them is no reason to leave a lane with one pack
  const int most = std::max(power_of_two_from(many ? ceil_divide(packs, 2) : packs, kThreads), usual);
  int more = usual, fewer = usual;
  bool whole = true;
  choose_geometry(it, places, kEnoughRows, [&](Geometry& of) {
    if (more < most) with_lanes(of, more *= 2, true);
    else if (fewer > kLeastLanes) with_lanes(of, fewer /= 2, true);
    else if (whole) with_lanes(of, most, whole = false);
    else return false;
    return true;
  });
}

// A tile is as wide as a warp, or down to a cache line's 128 bytes, and has four positions to a lane, or fewer, where
// that fills the device better.
inline void plan_columns(Geometry& it, int pack, int64_t places) {
  const int64_t vectors = it.wide ? it.channels / pack : it.channels;
  const auto with_tile = [=](Geometry& of, int channel_lanes, int lanes) {
    of.channel_lanes = channel_lanes;
    of.lanes = lanes;
    const int64_t samples_of_block = kThreads / channel_lanes / lanes;
    of.blocks = ceil_divide(vectors, channel_lanes) * ceil_divide(of.samples, samples_of_block);
    of.split = split_reduction(of.positions, lanes, of.blocks, places);
  };
  const auto lanes_of = [=](int64_t positions_of_lane, int channel_lanes) {
    return power_of_two_from(ceil_divide(it.positions, positions_of_lane), std::min(kThreads / channel_lanes, kWarp));
  };
  const int widest = power_of_two_from(vectors, kWarp), narrowest = std::min(widest, it.wide ? 8 : kWarp);
  with_tile(it, widest, lanes_of(4, widest));
  choose_geometry(it, places, {kFull, kFull}, [&](Geometry& of) {
    if (of.lanes < lanes_of(1, of.channel_lanes)) {
      with_tile(of, of.channel_lanes, of.lanes * 2);
    } else if (of.channel_lanes > narrowest) {
      with_tile(of, of.channel_lanes / 2, lanes_of(4, of.channel_lanes / 2));
    } else {
      return false;
    }
    return true;
  });
}

// Eight lanes to a row and so 32 rows to a block: where one tensor has its positions contiguous and the other its
// channels, the block reads whole 32-byte sectors of both.
inline void plan_strided(Geometry& it, int64_t places) {
  it.lanes = std::max(power_of_two_from(ceil_divide(it.positions, 4), 8), kLeastLanes);
  it.blocks = ceil_divide(it.samples * it.channels, kThreads / it.lanes);
  it.split = split_reduction(it.positions, int64_t(it.lanes) * kStridedWidth, it.blocks, places);
}

// `sizes` and strides as the tensors have them; channel_dim in 1..dims-1.
inline ChannelPlan plan_channel_sums(Operands in, const int64_t* sizes, const int64_t* strides_a,
                                     const int64_t* strides_g, int dims, int channel_dim, const Places& places) {
  ChannelPlan plan{};
  Geometry& it = plan.geometry;
  it.samples = sizes[0];
  it.channels = sizes[channel_dim];
  it.sample = {strides_a[0], strides_g[0]};
  it.channel = {strides_a[channel_dim], strides_g[channel_dim]};
  it.even = it.sample.a == it.channels * it.channel.a && it.sample.g == it.channels * it.channel.g;
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
            aligned(in.g, it.samples > 1 ? it.sample.g : 0, it.position.g) && aligned(in.rest, 0, 0);
  const bool adjacent_channels = it.channels == 1 || (it.channel.a == 1 && it.channel.g == 1);
  if (plan.walk.dims == 1 && plan.walk.contiguous()) {
    it.layout = Layout::rows;
    plan_rows(it, pack, places.rows);
  } else if (plan.walk.dims <= 1 && adjacent_channels) {
    it.layout = Layout::columns;
    plan_columns(it, pack, it.wide ? places.wide : places.narrow);
  } else {
    it.layout = Layout::strided;
    plan_strided(it, places.strided);
  }
  return plan;
}

}  // namespace fastscore::cuda
