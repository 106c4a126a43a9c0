// 3x3 convolutions in steps of 1 with a quarter of the products: Winograd's F(4x4, 3x3), Lavin and Gray, "Fast
// algorithms for convolutional neural networks", CVPR 2016. Compiled once per tier.
//
// 4x4 outputs come from a tile of 6x6 inputs: Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A. The sums over channels inside are 36 matrix
// products. The points are 0, ±2/3, ±3/2 and infinity, of which results are rounded three times less than with ±1, ±2.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

constexpr int kFloats = kWidth<float>;
constexpr float kInner = 2.0f / 3, kOuter = 3.0f / 2;  // the points; kInner · kOuter = 1

// Bᵀ d: six inputs in a row, `step` apart, in their place.
FASTSCORE_INLINE void transform_inputs(Vector<float>* d, int step) {
  constexpr float kInner2 = kInner * kInner, kOuter2 = kOuter * kOuter;
  Vector<float>&d0 = d[0], &d1 = d[step], &d2 = d[2 * step], &d3 = d[3 * step], &d4 = d[4 * step], &d5 = d[5 * step];
  const Vector<float> inner_even = d4 - kOuter2 * d2, inner_odd = kInner * d3 - kOuter * d1;
  const Vector<float> outer_even = d4 - kInner2 * d2, outer_odd = kOuter * d3 - kInner * d1;
  d0 += d4 - (kInner2 + kOuter2) * d2;
  d5 += d1 - (kInner2 + kOuter2) * d3;
  d1 = inner_even + inner_odd;
  d2 = inner_even - inner_odd;
  d3 = outer_even + outer_odd;
  d4 = outer_even - outer_odd;
}

// Aᵀ m: four outputs from six products, `step` apart, in the place of the first four.
FASTSCORE_INLINE void transform_products(Vector<float>* m, int step) {
  constexpr float kInner2 = kInner * kInner, kOuter2 = kOuter * kOuter;
  Vector<float>&m0 = m[0], &m1 = m[step], &m2 = m[2 * step], &m3 = m[3 * step];
  const Vector<float> inner_sum = m1 + m2, inner = m1 - m2;
  const Vector<float> outer_sum = m3 + m[4 * step], outer = m3 - m[4 * step];
  m0 += inner_sum + outer_sum;
  m1 = kInner * inner + kOuter * outer;
  m2 = kInner2 * inner_sum + kOuter2 * outer_sum;
  m3 = kInner2 * kInner * inner + kOuter2 * kOuter * outer + m[5 * step];
}

// The first n elements, n up to the width, and zeros.
FASTSCORE_INLINE Vector<float> load_some(const float* p, int n) { return n == kFloats ? load(p) : load(p, n); }

// The transformed inputs of one tile, [36, tiles of the block, C]: `inputs` is where its first product goes.
inline void tile_inputs(const Winograd& task, const WinogradTile& tile, float* inputs, int64_t product) {
  const int64_t first_y = tile.y * kTile - task.padding_y, first_x = tile.x * kTile - task.padding_x;
  const float* sample = task.in + tile.sample * task.height * task.width * task.channels;
  for (int64_t c = 0; c < task.channels; c += kFloats) {
    const int n = task.channels - c < kFloats ? int(task.channels - c) : kFloats;
    Vector<float> d[36];
    for (int y = 0; y < 6; ++y) {
      for (int x = 0; x < 6; ++x) {
        const int64_t in_y = first_y + y, in_x = first_x + x;
        const bool inside = in_y >= 0 && in_y < task.height && in_x >= 0 && in_x < task.width;
        d[y * 6 + x] = inside ? load_some(sample + (in_y * task.width + in_x) * task.channels + c, n) : Vector<float>{};
      }
    }
    for (int x = 0; x < 6; ++x) transform_inputs(d + x, 6);
    for (int y = 0; y < 6; ++y) transform_inputs(d + 6 * y, 1);
    for (int p = 0; p < 36; ++p) store_some(inputs + p * product + c, d[p], n);
  }
}

// The outputs of one tile from its products, [36, tiles of the block, panels · kPanel].
inline void tile_outputs(const Winograd& task, const WinogradTile& tile, const float* products, int64_t product) {
  const int64_t first_y = tile.y * kTile, first_x = tile.x * kTile;
  const int rows = int(task.out_height - first_y < kTile ? task.out_height - first_y : kTile);
  const int columns = int(task.out_width - first_x < kTile ? task.out_width - first_x : kTile);
  float* const out = task.out + ((tile.sample * task.out_height + first_y) * task.out_width + first_x) * task.outputs;
  for (int64_t k = 0; k < task.outputs; k += kFloats) {
    const int n = task.outputs - k < kFloats ? int(task.outputs - k) : kFloats;
    Vector<float> m[36];
    for (int p = 0; p < 36; ++p) m[p] = load(products + p * product + k);
    for (int x = 0; x < 6; ++x) transform_products(m + x, 6);
    for (int y = 0; y < 4; ++y) transform_products(m + 6 * y, 1);
    const Vector<float> bias = task.bias ? load_some(task.bias + k, n) : Vector<float>{};
    for (int y = 0; y < rows; ++y) {
      for (int x = 0; x < columns; ++x) {
        Vector<float> v = m[6 * y + x] + bias;
        v = v < task.low ? Vector<float>{} + task.low : v;  // NaN stays
        v = v > task.high ? Vector<float>{} + task.high : v;
        store_some(out + (y * task.out_width + x) * task.outputs + k, v, n);
      }
    }
  }
}

// Rows x kPanel of a matrix product: inputs [Rows, C] with rows `channels` apart, a panel of weights [C, kPanel].
template <int Rows>
void multiply_rows(const float* inputs, const float* weight, float* products, int64_t channels, int64_t stride) {
  constexpr int kColumns = 2;
  for (int first = 0; first < kPanel; first += kColumns * kFloats) {
    Vector<float> sums[Rows][kColumns] = {};
    for (int64_t c = 0; c < channels; ++c) {
      Vector<float> w[kColumns];
      for (int j = 0; j < kColumns; ++j) w[j] = load(weight + c * kPanel + first + j * kFloats);
      for (int r = 0; r < Rows; ++r) {
        const Vector<float> x = Vector<float>{} + inputs[r * channels + c];
        for (int j = 0; j < kColumns; ++j) sums[r][j] = multiply_add(x, w[j], sums[r][j]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int j = 0; j < kColumns; ++j) store(products + r * stride + first + j * kFloats, sums[r][j]);
    }
  }
}

constexpr int kMaxRows = kVectorBytes == 64 ? 14 : 6;  // as many as there are registers for

template <std::size_t... Rows>
FASTSCORE_INLINE auto rows_kernel(int rows, std::index_sequence<Rows...>) {
  constexpr decltype(&multiply_rows<1>) kKernels[] = {multiply_rows<int(Rows) + 1>...};
  return kKernels[rows - 1];
}

// Tiles [begin, end), some at a time.
inline void winograd(const Winograd& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t panels = task.panels(), width = panels * kPanel;
  for (int64_t first = begin; first < end; first += task.block) {
    const int64_t tiles = end - first < task.block ? end - first : task.block;
    float* const inputs = scratch;
    float* const products = scratch + 36 * tiles * task.channels;
    for (int64_t t = 0; t < tiles; ++t) {
      tile_inputs(task, task.tile(first + t), inputs + t * task.channels, tiles * task.channels);
    }
    const int64_t parts = (tiles + kMaxRows - 1) / kMaxRows;
    for (int64_t p = 0; p < 36; ++p) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* const weight = task.weight + (p * panels + panel) * task.channels * kPanel;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t row = tiles * part / parts, rows = tiles * (part + 1) / parts - row;
          rows_kernel(int(rows), std::make_index_sequence<kMaxRows>())(
              inputs + (p * tiles + row) * task.channels, weight, products + (p * tiles + row) * width + panel * kPanel,
              task.channels, width);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      tile_outputs(task, task.tile(first + t), products + t * width, tiles * width);
    }
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
