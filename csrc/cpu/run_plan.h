// Runs the items of a plan on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "plan.h"

namespace fastscore::cpu {

// Below this many elements, or partial sums, a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768, kPartialsPerThread = 262144;

// Adds up the chunks of samples [begin, end), in order and in float64.
template <class S>
void combine(const Plan& plan, int count, int64_t begin, int64_t end) {
  const int64_t width = plan.channel.size;
  for (int64_t n = begin; n < end; ++n) {
    for (int k = 0; k < count; ++k) {
      const S* partial = static_cast<const S*>(plan.partials) + (n * plan.chunks * count + k) * width;
      for (int64_t c = 0; c < width; ++c) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += partial[chunk * count * width + c];
        static_cast<S*>(plan.sums[k])[n * width + c] = S(sum);
      }
    }
  }
}

// kernel(begin, end) for ranges that cover the plan's items, which take `count` sums; then adds up the chunks.
template <class Kernel>
void run_plan(Plan& plan, Dtype dtype, int count, Kernel kernel) {
  const bool wide = dtype == Dtype::float64;
  std::unique_ptr<char[]> partials;
  if (plan.chunks > 1) {
    partials.reset(new char[plan.sample.size * plan.chunks * count * plan.channel.size * (wide ? 8 : 4)]);
    plan.partials = partials.get();
  }
  const int64_t grain = kElementsPerThread / std::max<int64_t>(plan.elements_per_item(), 1) + 1;
  torch::stable::parallel_for(0, plan.items(), grain, kernel);
  if (plan.chunks == 1) return;
  const auto add = wide ? combine<double> : combine<float>;
  torch::stable::parallel_for(0, plan.sample.size, kPartialsPerThread / (plan.chunks * count * plan.channel.size) + 1,
                              [&](int64_t begin, int64_t end) { add(plan, count, begin, end); });
}

}  // namespace fastscore::cpu
