// Σ over positions for every sample and channel: one walk per layout, one reducer per op. Compiled once per tier.
#pragma once

#include "simd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

// A reducer says which sums an op takes; x and y are vectors of activation and gradient.
struct Dot {
  static constexpr int kSums = 1;
  template <class V>
  static FASTSCORE_INLINE void add(V* sums, V x, V y) {
    sums[0] += x * y;
  }
};

struct Sums {
  static constexpr int kSums = 3;
  template <class V>
  static FASTSCORE_INLINE void add(V* sums, V x, V y) {
    sums[0] += x * y;
    sums[1] += x;
    sums[2] += y;
  }
};

struct Powers {
  static constexpr int kSums = 2;
  template <class V>
  static FASTSCORE_INLINE void add(V* sums, V x, V y) {
    const V product = x * y;
    sums[0] += absolute(product);
    sums[1] += product * product;
  }
};

// A row's operand in memory, or one value that stands for the whole row.
template <class T>
struct Dense {
  const T* p;
  FASTSCORE_INLINE Vector<T> at(int64_t i) const { return load(p + i); }
  FASTSCORE_INLINE Vector<T> at(int64_t i, int n) const { return load(p + i, n); }
};

template <class T>
struct Repeated {
  Sum<T> value;
  explicit Repeated(const T* p) : value(load(p, 1)[0]) {}
  FASTSCORE_INLINE Vector<T> at(int64_t) const { return Vector<T>{} + value; }
  FASTSCORE_INLINE Vector<T> at(int64_t, int n) const {
    Vector<T> v{};
    for (int i = 0; i < kWidth<T>; ++i) v[i] = i < n ? value : 0;
    return v;
  }
};

// Sums of one row, gathered over any number of stretches.
template <class T, class Reducer>
struct Row {
  static constexpr int kChains = 4, kSums = Reducer::kSums, kW = kWidth<T>;
  Vector<T> sums[kChains][kSums] = {};

  template <class G>
  FASTSCORE_INLINE void add(const T* a, G g, int64_t length) {
    int64_t i = 0;
    for (; i + kChains * kW <= length; i += kChains * kW) {
      for (int chain = 0; chain < kChains; ++chain) {
        Reducer::add(sums[chain], load(a + i + chain * kW), g.at(i + chain * kW));
      }
    }
    for (; i + kW <= length; i += kW) Reducer::add(sums[0], load(a + i), g.at(i));
    if (i < length) Reducer::add(sums[1], load(a + i, int(length - i)), g.at(i, int(length - i)));
  }

  FASTSCORE_INLINE Sum<T> total(int k) const {
    return sum_lanes<Sum<T>>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  }
};

// One item of a plan, and where it reads and writes.
template <class T, class Reducer>
struct Item {
  int64_t begin, end;      // positions
  int64_t first, channels;  // channels
  const T* a;               // of the first channel
  const T* g;
  Sum<T>* sums[Reducer::kSums];  // of the first channel

  Item(const Plan& plan, int64_t item) {
    const int64_t tile = item % plan.tiles, chunk = item / plan.tiles % plan.chunks;
    const int64_t sample = item / plan.tiles / plan.chunks, width = plan.channel.size;
    const int64_t positions = plan.positions.count();
    begin = chunk * plan.chunk;
    end = begin + plan.chunk < positions ? begin + plan.chunk : positions;
    first = tile * plan.tile;
    channels = first + plan.tile < width ? plan.tile : width - first;
    a = static_cast<const T*>(plan.a) + sample * plan.sample.a + first * plan.channel.a;
    g = static_cast<const T*>(plan.g) + sample * plan.sample.g + first * plan.channel.g;
    for (int k = 0; k < Reducer::kSums; ++k) {
      sums[k] = plan.chunks == 1
                    ? static_cast<Sum<T>*>(plan.sums[k]) + sample * width + first
                    : static_cast<Sum<T>*>(plan.partials) + ((sample * plan.chunks + chunk) * Reducer::kSums + k) * width + first;
    }
  }
};

template <class T, class Reducer, template <class> class G>
void rows(const Plan& plan, const Item<T, Reducer>& item) {
  for (int64_t c = 0; c < item.channels; ++c) {
    const T* a = item.a + c * plan.channel.a;
    const T* g = item.g + c * plan.channel.g;
    Row<T, Reducer> row;
    plan.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
      row.add(a + offset_a, G<T>{g + offset_g}, length);
    });
    for (int k = 0; k < Reducer::kSums; ++k) item.sums[k][c] = row.total(k);
  }
}

// Adds `Positions` positions, `Vectors` vectors of channels at a time, from channel c while they last.
template <class T, class Reducer, int Positions, int Vectors>
FASTSCORE_INLINE int64_t add_columns(const T* a, const T* g, int64_t stride_a, int64_t stride_g, int64_t c,
                                     int64_t channels, Sum<T>* const* sums) {
  constexpr int kW = kWidth<T>;
  for (; c + Vectors * kW <= channels; c += Vectors * kW) {
    Vector<T> group[Vectors][Reducer::kSums] = {};
    for (int p = 0; p < Positions; ++p) {
      for (int v = 0; v < Vectors; ++v) {
        Reducer::add(group[v], load(a + p * stride_a + c + v * kW), load(g + p * stride_g + c + v * kW));
      }
    }
    for (int v = 0; v < Vectors; ++v) {
      for (int k = 0; k < Reducer::kSums; ++k) {
        Sum<T>* sum = sums[k] + c + v * kW;
        store(sum, load(sum) + group[v][k]);
      }
    }
  }
  return c;
}

template <class T, class Reducer, int Positions>
FASTSCORE_INLINE void add_positions(const T* a, const T* g, int64_t stride_a, int64_t stride_g, int64_t channels,
                                    Sum<T>* const* sums) {
  // A whole cache line of each position at a time: lines of positions a power of two apart evict one another.
  constexpr int kLine = 64 / sizeof(T) / kWidth<T>, kVectors = kLine < 1 ? 1 : kLine > 4 ? 4 : kLine;
  int64_t c = add_columns<T, Reducer, Positions, kVectors>(a, g, stride_a, stride_g, 0, channels, sums);
  if constexpr (kVectors > 1) {
    c = add_columns<T, Reducer, Positions, 1>(a, g, stride_a, stride_g, c, channels, sums);
  }
  if (const int rest = int(channels - c)) {
    Vector<T> group[Reducer::kSums] = {};
    for (int p = 0; p < Positions; ++p) {
      Reducer::add(group, load(a + p * stride_a + c, rest), load(g + p * stride_g + c, rest));
    }
    for (int k = 0; k < Reducer::kSums; ++k) store(sums[k] + c, load(sums[k] + c, rest) + group[k], rest);
  }
}

template <class T, class Reducer>
void columns(const Plan& plan, const Item<T, Reducer>& item) {
  constexpr int kPositions = 8;
  for (int k = 0; k < Reducer::kSums; ++k) memset(item.sums[k], 0, item.channels * sizeof(Sum<T>));
  const int64_t stride_a = plan.positions.inner().a, stride_g = plan.positions.inner().g;
  plan.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
    const T* a = item.a + offset_a;
    const T* g = item.g + offset_g;
    int64_t p = 0;
    for (; p + kPositions <= length; p += kPositions) {
      add_positions<T, Reducer, kPositions>(a + p * stride_a, g + p * stride_g, stride_a, stride_g, item.channels,
                                            item.sums);
    }
    for (; p < length; ++p) {
      add_positions<T, Reducer, 1>(a + p * stride_a, g + p * stride_g, stride_a, stride_g, item.channels, item.sums);
    }
  });
}

constexpr int64_t kPackedChannels = 16, kPackedPositions = 128;

// Copies positions [begin, end) of up to kPackedChannels channels into rows of kPackedPositions.
template <class T, class Offset>
void pack(const Plan& plan, const T* source, int64_t channel_stride, int64_t position_stride, int64_t begin,
          int64_t end, int64_t channels, T* rows, Offset choose) {
  T* column = rows;
  plan.positions.runs(begin, end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
    const T* from = source + choose(offset_a, offset_g);
    for (int64_t p = 0; p < length; ++p, ++column) {
      for (int64_t c = 0; c < channels; ++c) {
        column[c * kPackedPositions] = from[p * position_stride + c * channel_stride];
      }
    }
  });
}

template <class T, class Reducer>
void packed(const Plan& plan, const Item<T, Reducer>& item) {
  T rows_a[kPackedChannels * kPackedPositions], rows_g[kPackedChannels * kPackedPositions];
  Sum<T> sums[Reducer::kSums][kPackedChannels] = {};
  const Dim& inner = plan.positions.inner();
  for (int64_t begin = item.begin; begin < item.end; begin += kPackedPositions) {
    const int64_t end = begin + kPackedPositions < item.end ? begin + kPackedPositions : item.end;
    pack(plan, item.a, plan.channel.a, inner.a, begin, end, item.channels, rows_a,
         [](int64_t offset, int64_t) { return offset; });
    pack(plan, item.g, plan.channel.g, inner.g, begin, end, item.channels, rows_g,
         [](int64_t, int64_t offset) { return offset; });
    for (int64_t c = 0; c < item.channels; ++c) {
      Row<T, Reducer> row;
      row.add(rows_a + c * kPackedPositions, Dense<T>{rows_g + c * kPackedPositions}, end - begin);
      for (int k = 0; k < Reducer::kSums; ++k) sums[k][c] += row.total(k);
    }
  }
  for (int k = 0; k < Reducer::kSums; ++k) memcpy(item.sums[k], sums[k], item.channels * sizeof(Sum<T>));
}

// Items [begin, end) of a plan.
template <class T, class Reducer>
void channel_sums(const Plan& plan, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Item<T, Reducer> item(plan, i);
    if (plan.path == Path::columns) {
      columns(plan, item);
    } else if (plan.path == Path::packed) {
      packed(plan, item);
    } else if (plan.positions.inner().g == 1) {
      rows<T, Reducer, Dense>(plan, item);
    } else {
      rows<T, Reducer, Repeated>(plan, item);
    }
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
