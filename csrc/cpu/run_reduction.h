// Runs the items of a reduction on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "reduction.h"

namespace fastscore::cpu {

// Below this many elements, or partial sums, a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768, kPartialsPerThread = 262144;

// Adds up the chunks of samples [begin, end), in order and in float64.
template <class S>
void combine(const Reduction& reduction, int count, int64_t begin, int64_t end) {
  const int64_t width = reduction.channel.size;
  for (int64_t n = begin; n < end; ++n) {
    for (int k = 0; k < count; ++k) {
      const S* partial = static_cast<const S*>(reduction.partials) + (n * reduction.chunks * count + k) * width;
      for (int64_t c = 0; c < width; ++c) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < reduction.chunks; ++chunk) sum += partial[chunk * count * width + c];
        static_cast<S*>(reduction.sums[k])[n * width + c] = S(sum);
      }
    }
  }
}

// kernel(begin, end) for ranges that cover the reduction's items, which take `count` sums; then adds up the chunks.
template <class Kernel>
void run_reduction(Reduction& reduction, Dtype dtype, int count, Kernel kernel) {
  const bool wide = dtype == Dtype::float64;
  std::unique_ptr<char[]> partials;
  if (reduction.chunks > 1) {
    partials.reset(
        new char[reduction.sample.size * reduction.chunks * count * reduction.channel.size * (wide ? 8 : 4)]);
    reduction.partials = partials.get();
  }
  const int64_t grain = kElementsPerThread / std::max<int64_t>(reduction.elements_per_item(), 1) + 1;
  torch::stable::parallel_for(0, reduction.items(), grain, kernel);
  if (reduction.chunks == 1) return;
  const auto add = wide ? combine<double> : combine<float>;
  torch::stable::parallel_for(0, reduction.sample.size,
                              kPartialsPerThread / (reduction.chunks * count * reduction.channel.size) + 1,
                              [&](int64_t begin, int64_t end) { add(reduction, count, begin, end); });
}

}  // namespace fastscore::cpu
