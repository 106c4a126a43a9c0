#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>

#include "arguments.h"
#include "kernels.h"

namespace fastscore::cpu {
namespace {

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

void run(Plan& plan, Dtype dtype, Op op, int count) {
  const bool wide = dtype == Dtype::float64;
  std::unique_ptr<char[]> partials;
  if (plan.chunks > 1) {
    partials.reset(new char[plan.sample.size * plan.chunks * count * plan.channel.size * (wide ? 8 : 4)]);
    plan.partials = partials.get();
  }
  const auto kernel = kernels().channel_sums[int(dtype)][op];
  const int64_t grain = kElementsPerThread / std::max<int64_t>(plan.elements_per_item(), 1) + 1;
  torch::stable::parallel_for(0, plan.items(), grain, [&](int64_t begin, int64_t end) { kernel(plan, begin, end); });
  if (plan.chunks == 1) return;
  const auto add = wide ? combine<double> : combine<float>;
  torch::stable::parallel_for(0, plan.sample.size, kPartialsPerThread / (plan.chunks * count * plan.channel.size) + 1,
                              [&](int64_t begin, int64_t end) { add(plan, count, begin, end); });
}

template <int Count>
std::array<Tensor, Count> reduce(const Tensor& a, const Tensor& g, int64_t channel_dim, Op op) {
  const auto sizes = a.sizes(), strides_a = a.strides(), strides_g = g.strides();
  const int64_t dims = int64_t(sizes.size());
  require(sizes == g.sizes(), "a and g differ in shape");
  require(a.scalar_type() == g.scalar_type(), "a and g differ in dtype");
  require(dims >= 2 && dims <= kMaxDims, "a has to have 2 to 64 dimensions");
  if (channel_dim < 0) channel_dim += dims;
  require(channel_dim > 0 && channel_dim < dims, "channel_dim is out of range");

  Plan plan;
  const auto dim = [&](int64_t d) { return Dim{sizes[d], strides_a[d], strides_g[d]}; };
  plan.sample = dim(0);
  plan.channel = dim(channel_dim);
  for (int64_t d = 1; d < dims; ++d) {
    if (d != channel_dim) plan.positions.add(dim(d));
  }
  const Dtype dtype = dtype_of(a);
  const int64_t shape[] = {plan.sample.size, plan.channel.size};
  std::array<Tensor, Count> sums = new_outputs<Count>(shape, 2, dtype);
  if (shape[0] == 0 || shape[1] == 0) return sums;
  if (plan.positions.count() == 0) {  // and perhaps no memory behind the operands
    const size_t bytes = shape[0] * shape[1] * (dtype == Dtype::float64 ? 8 : 4);
    for (Tensor& sum : sums) memset(sum.mutable_data_ptr(), 0, bytes);
    return sums;
  }
  plan.a = a.const_data_ptr();
  plan.g = g.const_data_ptr();
  for (int k = 0; k < Count; ++k) plan.sums[k] = sums[k].mutable_data_ptr();
  choose_path(plan);
  run(plan, dtype, op, Count);
  return sums;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  return reduce<1>(a, g, channel_dim, kDot)[0];
}

std::tuple<Tensor, Tensor, Tensor> channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto [dot, sum_a, sum_g] = reduce<3>(a, g, channel_dim, kSums);
  return {dot, sum_a, sum_g};
}

std::tuple<Tensor, Tensor> channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto [absolute, square] = reduce<2>(a, g, channel_dim, kPowers);
  return {absolute, square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cpu
