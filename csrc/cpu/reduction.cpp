#include "reduction.h"

#include <algorithm>

namespace fastscore::cpu {
namespace {

// Positions per chunk: long enough that a partial sum costs nothing, short enough to feed many threads from one sample
// and to bound the rounding error. A row's stretches spread over as many sums as they are long, up to kMostSums, each
// of which gets about kAdditions; all else adds a chunk to few sums.
constexpr int64_t kMostSums = 64, kAdditions = 64, kChunk = 512;
// Channels per tile: a tile's sums stay in the first-level cache (columns), whole cache lines of channels are read
// (squares), items are of some size and fill the vectors that lanes are added up in (rows).
constexpr int64_t kColumnTile = kMaxColumnTile, kSquareTile = 32, kRowItem = 16384, kRowTile = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One walk over samples × channels where the strides allow it.
void merge_samples(Reduction& reduction) {
  Dim& n = reduction.sample;
  Dim& c = reduction.channel;
  if (n.size == 1 || n.a != c.size * c.a || n.g != c.size * c.g) return;
  c.size *= n.size;
  n = {1, 0, 0};
}

}  // namespace

void Dims::collapse() {
  Dim* end = std::remove_if(dim, dim + depth, [](const Dim& d) { return d.size == 1; });
  std::stable_sort(dim, end, [](const Dim& x, const Dim& y) { return x.a != y.a ? x.a > y.a : x.g > y.g; });
  int kept = 0;
  for (Dim* d = dim; d != end; ++d) {
    Dim* outer = kept ? dim + kept - 1 : nullptr;
    if (outer && outer->a == d->a * d->size && outer->g == d->g * d->size) {
      *outer = {outer->size * d->size, d->a, d->g};
    } else {
      dim[kept++] = *d;
    }
  }
  if (!kept) dim[kept++] = {1, 1, 1};
  depth = kept;
}

int64_t Dims::count() const {
  int64_t product = 1;
  for (int d = 0; d < depth; ++d) product *= dim[d].size;
  return product;
}

bool Dims::repeats_g() const {
  return std::all_of(dim, dim + depth, [](const Dim& d) { return d.g == 0; });
}

void choose_path(Reduction& reduction) {
  reduction.positions.collapse();
  const int64_t positions = reduction.positions.count();
  const Dim& inner = reduction.positions.inner();
  Dim& channel = reduction.channel;
  const bool columns =
      channel.a == 1 && (channel.g == 1 || reduction.positions.repeats_g()) && (channel.size > 1 || positions == 1);
  const bool rows = inner.a == 1 && (inner.g == 1 || inner.g == 0);
  const bool squares = (channel.a == 1 && inner.g == 1) || (inner.a == 1 && channel.g == 1);
  reduction.strided = !columns && !rows && !squares;
  if (reduction.strided) {
    const bool near = channel.size > 1 && channel.a + channel.g < inner.a + inner.g;
    reduction.path = near || positions == 1 ? Path::columns : Path::rows;
  } else if (columns && (positions == 1 || inner.a != 1)) {
    reduction.path = Path::columns;
  } else {
    reduction.path = rows ? Path::rows : Path::squares;
  }
  if (reduction.path == Path::rows || positions == 1) merge_samples(reduction);
  const int64_t stretch = reduction.positions.depth == 1 ? kMostSums : std::min(inner.size, kMostSums);
  const int64_t longest = reduction.path == Path::rows ? stretch * kAdditions : kChunk;
  reduction.chunks = std::max<int64_t>(ceil_div(positions, longest), 1);
  reduction.chunk = ceil_div(positions, reduction.chunks);
  const int64_t widest = reduction.path == Path::columns ? kColumnTile
                         : reduction.path == Path::squares
                             ? kSquareTile
                             : ceil_div(kRowItem / std::max<int64_t>(reduction.chunk, 1) + 1, kRowTile) * kRowTile;
  reduction.tile = std::max<int64_t>(std::min(widest, channel.size), 1);
  reduction.tiles = ceil_div(channel.size, reduction.tile);
}

}  // namespace fastscore::cpu
