// Σ over positions for every sample and channel: one walk per layout, one reducer per op. Compiled once per tier.
#pragma once

#include "operands.h"

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

// Sums of one row, lane by lane, gathered over any number of stretches in `Chains` independent sums.
template <class T, class Reducer, int Chains>
struct Row {
  static constexpr int kSums = Reducer::kSums, kW = kWidth<T>;
  Vector<T> sums[Chains][kSums] = {};

  template <int Vectors, class A, class G>
  FASTSCORE_INLINE void add_vectors(A a, G g, int64_t i) {
    for (int v = 0; v < Vectors; ++v) {
      if (v * kW * sizeof(T) % 64 == 0) {
        a.prefetch_from(i + v * kW);
        g.prefetch_from(i + v * kW);
      }
      Reducer::add(sums[v], a.at(i + v * kW), g.at(i + v * kW));
    }
  }

  template <class A, class G>
  FASTSCORE_INLINE void add(A a, G g, int64_t length) {
    int64_t i = 0;
    for (; i + Chains * kW <= length; i += Chains * kW) add_vectors<Chains>(a, g, i);
    if constexpr (Chains > 2) {
      if (i + 2 * kW <= length) {
        add_vectors<2>(a, g, i);
        i += 2 * kW;
      }
    }
    if constexpr (Chains > 1) {
      if (i + kW <= length) {
        Reducer::add(sums[Chains - 2], a.at(i), g.at(i));
        i += kW;
      }
    }
    if (i < length) Reducer::add(sums[Chains - 1], a.at(i, int(length - i)), g.at(i, int(length - i)));
  }

  FASTSCORE_INLINE Vector<T> lanes(int k) const {
    Vector<T> sum = sums[0][k];
    for (int chain = 1; chain < Chains; ++chain) sum += sums[chain][k];
    return sum;
  }
};

// One item of a reduction: the positions [begin, end) of some channels, and where the first of them is read and
// written.
template <class T, class Reducer>
struct Item {
  int64_t begin, end, channels;
  const T* a;
  const T* g;
  Sum<T>* sums[Reducer::kSums];

  Item(const Reduction& reduction, int64_t item) {
    const int64_t tile = item % reduction.tiles, chunk = item / reduction.tiles % reduction.chunks;
    const int64_t sample = item / reduction.tiles / reduction.chunks;
    const int64_t positions = reduction.positions.count(), width = reduction.channel.size,
                  first = tile * reduction.tile;
    begin = chunk * reduction.chunk;
    end = begin + reduction.chunk < positions ? begin + reduction.chunk : positions;
    channels = first + reduction.tile < width ? reduction.tile : width - first;
    a = static_cast<const T*>(reduction.a) + sample * reduction.sample.a + first * reduction.channel.a;
    g = static_cast<const T*>(reduction.g) + sample * reduction.sample.g + first * reduction.channel.g;
    for (int k = 0; k < Reducer::kSums; ++k) {
      const int64_t row = reduction.chunks == 1 ? sample : (sample * reduction.chunks + chunk) * Reducer::kSums + k;
      sums[k] =
          static_cast<Sum<T>*>(reduction.chunks == 1 ? reduction.sums[k] : reduction.partials) + row * width + first;
    }
  }
};

template <class T, class Reducer, template <class> class A, template <class> class G, int Chains>
void rows_in_chains(const Reduction& reduction, const Item<T, Reducer>& item) {
  constexpr int kW = kWidth<T>;
  const Dim& inner = reduction.positions.inner();
  for (int64_t first = 0; first < item.channels; first += kW) {
    const int count = first + kW < item.channels ? kW : int(item.channels - first);
    Vector<T> lanes[Reducer::kSums][kW];
    for (int c = 0; c < count; ++c) {
      const T* a = item.a + (first + c) * reduction.channel.a;
      const T* g = item.g + (first + c) * reduction.channel.g;
      Row<T, Reducer, Chains> row;
      reduction.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
        row.add(A<T>{a + offset_a, inner.a}, G<T>{g + offset_g, inner.g}, length);
      });
      for (int k = 0; k < Reducer::kSums; ++k) lanes[k][c] = row.lanes(k);
    }
    for (int k = 0; k < Reducer::kSums; ++k) {
      for (int c = count; c < kW; ++c) lanes[k][c] = Vector<T>{};
      store_some(item.sums[k] + first, sum_lanes<kW>(lanes[k]), count);
    }
  }
}

template <class T, class Reducer, template <class> class A, template <class> class G>
void rows(const Reduction& reduction, const Item<T, Reducer>& item) {
  if (reduction.chunk < 8 * kWidth<T>) {
    rows_in_chains<T, Reducer, A, G, 1>(reduction, item);  // short rows overlap one another
  } else {
    rows_in_chains<T, Reducer, A, G, 4>(reduction, item);
  }
}

// Some positions of all channels of an item; `position` is the step between positions.
template <class T, template <class> class Operand>
struct Columns {
  const T* a;
  const T* g;
  Dim position, channel;

  FASTSCORE_INLINE Operand<T> a_at(int p) const { return Operand<T>{a + p * position.a, channel.a}; }
  FASTSCORE_INLINE Operand<T> g_at(int p) const { return Operand<T>{g + p * position.g, channel.g}; }
};

// Sums of channels c to c + Vectors · width over `positions` positions, added to what `sums` holds unless these are
// the first.
template <class T, class Reducer, int Vectors, class Columns>
FASTSCORE_INLINE void add_channels(const Columns& from, int positions, bool first, int64_t c, Sum<T>* const* sums) {
  constexpr int kW = kWidth<T>;
  Vector<T> group[Vectors][Reducer::kSums] = {};
  for (int p = 0; p < positions; ++p) {
    const auto a = from.a_at(p), g = from.g_at(p);
    prefetch(a.p + c * from.channel.a, positions * from.position.a * int64_t(sizeof(T)));  // the next group
    prefetch(g.p + c * from.channel.g, positions * from.position.g * int64_t(sizeof(T)));
    for (int v = 0; v < Vectors; ++v) Reducer::add(group[v], a.at(c + v * kW), g.at(c + v * kW));
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int k = 0; k < Reducer::kSums; ++k) {
      Sum<T>* sum = sums[k] + c + v * kW;
      store(sum, first ? group[v][k] : load(sum) + group[v][k]);
    }
  }
}

template <class T, class Reducer, class Columns>
FASTSCORE_INLINE void add_positions(const Columns& from, int positions, bool first, int64_t channels,
                                    Sum<T>* const* sums) {
  constexpr int kW = kWidth<T>;
  // A whole cache line of each position at a time: lines of positions a power of two apart evict one another.
  constexpr int kLine = 64 / sizeof(T) / kW, kVectors = kLine < 1 ? 1 : kLine > 4 ? 4 : kLine;
  int64_t c = 0;
  for (; c + kVectors * kW <= channels; c += kVectors * kW) {
    add_channels<T, Reducer, kVectors>(from, positions, first, c, sums);
  }
  for (; c + kW <= channels; c += kW) add_channels<T, Reducer, 1>(from, positions, first, c, sums);
  if (const int rest = int(channels - c)) {
    Vector<T> group[Reducer::kSums] = {};
    for (int p = 0; p < positions; ++p) Reducer::add(group, from.a_at(p).at(c, rest), from.g_at(p).at(c, rest));
    for (int k = 0; k < Reducer::kSums; ++k) {
      Sum<T>* sum = sums[k] + c;
      store_some(sum, first ? group[k] : load(sum, rest) + group[k], rest);
    }
  }
}

// Adds `length` positions; returns false, since what follows is not the first.
template <class T, class Reducer, class Columns>
FASTSCORE_INLINE bool add_stretch(Columns from, int64_t length, bool first, int64_t channels, Sum<T>* const* sums) {
  constexpr int kPositions = 8;
  for (; length >= 2 * kPositions; length -= kPositions) {
    add_positions<T, Reducer>(from, kPositions, first, channels, sums);
    from.a += kPositions * from.position.a;
    from.g += kPositions * from.position.g;
    first = false;
  }
  add_positions<T, Reducer>(from, int(length), first, channels, sums);
  return false;
}

template <class T, class Reducer, template <class> class Operand>
void columns(const Reduction& reduction, const Item<T, Reducer>& item) {
  Columns<T, Operand> from{nullptr, nullptr, reduction.positions.inner(), reduction.channel};
  const T* channels_g = item.g;
  T copy[kMaxColumnTile];
  if (!reduction.strided && reduction.channel.g != 1) {
    for (int64_t c = 0; c < item.channels; ++c) copy[c] = item.g[c * reduction.channel.g];
    channels_g = copy;
    from.position.g = 0;
  }
  bool first = true;
  reduction.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
    from.a = item.a + offset_a;
    from.g = channels_g + offset_g;
    first = add_stretch<T, Reducer>(from, length, first, item.channels, item.sums);
  });
}

// Few channels, whose positions follow one another without a gap: as many positions as fill whole vectors count as one
// of as many times the channels, and what these give is added up at the end.
constexpr int64_t kFewChannels = 64;

template <class T, class Reducer>
void few_columns(const Reduction& reduction, const Item<T, Reducer>& item) {
  constexpr int64_t kW = kWidth<T>;
  const int64_t channels = item.channels;
  int64_t joined = 1;
  while (joined * channels % kW != 0 || joined * channels < 4 * kW) joined *= 2;
  const int64_t wide = joined * channels;
  Sum<T> wide_sums[Reducer::kSums][kFewChannels * kW] = {};
  Sum<T>* sums[Reducer::kSums];
  for (int k = 0; k < Reducer::kSums; ++k) sums[k] = wide_sums[k];
  reduction.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
    const int64_t whole = length / joined, rest = length % joined;
    Columns<T, Dense> from{item.a + offset_a, item.g + offset_g, {0, wide, wide}, {0, 1, 1}};
    add_stretch<T, Reducer>(from, whole, false, wide, sums);
    from.a += whole * wide;
    from.g += whole * wide;
    add_positions<T, Reducer>(from, 1, false, rest * channels, sums);
  });
  for (int k = 0; k < Reducer::kSums; ++k) {
    for (int64_t c = 0; c < channels; ++c) {
      Sum<T> sum = 0;
      for (int64_t i = c; i < wide; i += channels) sum += sums[k][i];
      item.sums[k][c] = sum;
    }
  }
}

// Channels by positions: vector c holds channel c, and zeros stand beyond the edges.
template <class T>
FASTSCORE_INLINE void load_square(const T* p, int64_t channel_stride, int64_t position_stride, int channels,
                                  int positions, Vector<T>* square) {
  constexpr int kW = kWidth<T>;
  const auto load_line = [&](const T* line, int n) { return n == kW ? load(line) : load(line, n); };
  const bool across = channel_stride == 1;  // a line holds channels, or else positions
  const int64_t step = across ? position_stride : channel_stride;
  const int lines = across ? positions : channels, length = across ? channels : positions;
  for (int i = 0; i < kW; ++i) square[i] = i < lines ? load_line(p + i * step, length) : Vector<T>{};
  if (across) transpose<kW>(square);
}

template <class T, class Reducer>
void squares(const Reduction& reduction, const Item<T, Reducer>& item) {
  constexpr int kW = kWidth<T>;
  const Dim &channel = reduction.channel, &inner = reduction.positions.inner();
  for (int64_t first = 0; first < item.channels; first += kW) {
    const int channels = first + kW < item.channels ? kW : int(item.channels - first);
    Vector<T> lanes[kW][Reducer::kSums] = {};
    reduction.positions.runs(item.begin, item.end, [&](int64_t offset_a, int64_t offset_g, int64_t length) {
      const T* a = item.a + first * channel.a + offset_a;
      const T* g = item.g + first * channel.g + offset_g;
      for (int64_t p = 0; p < length; p += kW) {
        const int positions = p + kW < length ? kW : int(length - p);
        Vector<T> square_a[kW], square_g[kW];
        load_square(a + p * inner.a, channel.a, inner.a, channels, positions, square_a);
        load_square(g + p * inner.g, channel.g, inner.g, channels, positions, square_g);
        for (int c = 0; c < kW; ++c) Reducer::add(lanes[c], square_a[c], square_g[c]);
      }
    });
    for (int k = 0; k < Reducer::kSums; ++k) {
      Vector<T> of_sum[kW];
      for (int c = 0; c < kW; ++c) of_sum[c] = lanes[c][k];
      store_some(item.sums[k] + first, sum_lanes<kW>(of_sum), channels);
    }
  }
}

template <class T, class Reducer>
void (*walk_of(const Reduction& reduction))(const Reduction&, const Item<T, Reducer>&) {
  const Dim &inner = reduction.positions.inner(), &channel = reduction.channel;
  switch (reduction.path) {
    case Path::squares: return squares<T, Reducer>;
    case Path::rows:
      if (reduction.strided) return rows<T, Reducer, Strided, Strided>;
      return inner.g == 0 ? rows<T, Reducer, Dense, Repeated> : rows<T, Reducer, Dense, Dense>;
    default:
      if (reduction.strided) return columns<T, Reducer, Strided>;
      if (channel.size < kFewChannels && inner.a == channel.size && inner.g == channel.size && channel.g == 1)
        return few_columns<T, Reducer>;
      return columns<T, Reducer, Dense>;
  }
}

// Items [begin, end) of a reduction.
template <class T, class Reducer>
void channel_sums(const Reduction& reduction, int64_t begin, int64_t end) {
  const auto walk = walk_of<T, Reducer>(reduction);
  for (int64_t i = begin; i < end; ++i) {
    walk(reduction, Item<T, Reducer>(reduction, i));
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
