// How a reduction over positions is walked: torch-free, made once per call from sizes and strides.
#pragma once

#include <cstdint>

#include "half.h"

namespace fastscore::cpu {

// One dimension shared by two tensors; strides count elements.
struct Dim {
  int64_t size, a, g;
};

constexpr int kMaxDims = 64;
constexpr int kMaxColumnTile = 1024;  // channels of an item that walks columns

// Dimensions from outermost to innermost. Neighbours that one stride can walk are merged, dimensions of size 1 dropped;
// at least one remains.
struct Dims {
  int depth = 0;
  Dim dim[kMaxDims];

  void add(Dim d) { dim[depth++] = d; }
  void collapse();
  int64_t count() const;
  bool repeats_g() const;  // stride 0 throughout
  const Dim& inner() const { return dim[depth - 1]; }

  // f(offset in a, offset in g, length) for every stretch of the innermost dimension that covers [begin, end).
  template <class F>
  void runs(int64_t begin, int64_t end, F f) const {
    if (begin >= end) return;  // as where a dimension is of size 0
    const Dim& last = inner();
    if (depth == 1) {
      f(begin * last.a, begin * last.g, end - begin);
      return;
    }
    int64_t index[kMaxDims], offset_a = 0, offset_g = 0, rest = begin;
    for (int d = depth - 1; d >= 0; --d) {
      index[d] = rest % dim[d].size;
      rest /= dim[d].size;
      offset_a += index[d] * dim[d].a;
      offset_g += index[d] * dim[d].g;
    }
    for (int64_t first = index[depth - 1]; begin < end; first = 0) {
      const int64_t left = last.size - first, length = left < end - begin ? left : end - begin;
      f(offset_a, offset_g, length);
      begin += length;
      offset_a -= first * last.a;
      offset_g -= first * last.g;
      for (int d = depth - 2; d >= 0; --d) {  // the next stretch, as an odometer counts
        offset_a += dim[d].a;
        offset_g += dim[d].g;
        if (++index[d] < dim[d].size) break;
        offset_a -= dim[d].size * dim[d].a;
        offset_g -= dim[d].size * dim[d].g;
        index[d] = 0;
      }
    }
  }
};

// rows: positions lie next to each other (g may repeat one value). columns: channels do (g may repeat its channels'
// values at every position). squares: positions do in one tensor, channels in the other; squares of both are transposed
// in registers. Where nothing lies next to each other, rows or columns are `strided`: whichever has the smaller steps.
enum class Path { rows, columns, squares };

// An item is (sample, chunk of positions, tile of channels); the split follows from the shape alone, so that the
// result does not depend on the number of threads. Every item writes sums of its own; `partials` holds them where a
// sample has several chunks.
struct Reduction {
  Path path;
  bool strided;
  Dim sample, channel;
  Dims positions;
  int64_t chunk, chunks;  // positions per chunk; chunks per sample
  int64_t tile, tiles;    // channels per tile; tiles per sample
  const void* a;
  const void* g;
  void* sums[3];   // [N, C] each
  void* partials;  // [N, chunks, sums, C]

  int64_t items() const { return sample.size * chunks * tiles; }
  int64_t elements_per_item() const { return chunk * tile; }
};

// Chooses path and split; `reduction` comes with sample, channel and positions as the tensors have them.
void choose_path(Reduction& reduction);

}  // namespace fastscore::cpu
