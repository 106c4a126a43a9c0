#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>

#include "arguments.h"
#include "kernels.h"
#include "run_plan.h"

namespace fastscore::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> clamp_backward_(const Tensor& y, Tensor g, const std::optional<Tensor>& rest,
                                                   double low, double high) {
  const auto sizes = y.sizes(), strides = y.strides();
  const int64_t dims = int64_t(sizes.size());
  require(dims >= 2 && dims <= kMaxDims, "y has to have 2 to 64 dimensions");
  const auto check = [&](const Tensor& x) {
    require(sizes == x.sizes() && strides == x.strides(), "y, g and rest differ in shape or strides");
    require(y.scalar_type() == x.scalar_type(), "y, g and rest differ in dtype");
  };
  check(g);
  if (rest) check(*rest);
  ClampBackward task;
  Plan& plan = task.plan;
  const auto dim = [&](int64_t d) { return Dim{sizes[d], strides[d], strides[d]}; };
  plan.sample = dim(0);
  plan.channel = dim(1);
  for (int64_t d = 2; d < dims; ++d) plan.positions.add(dim(d));
  const Dtype dtype = dtype_of(y);
  const int64_t shape[] = {sizes[0], sizes[1]};
  const std::array<Tensor, 3> sums = new_outputs<3>(shape, 2, dtype);
  const auto results = [&] { return std::tuple(sums[0], sums[1], sums[2]); };
  if (shape[0] == 0 || shape[1] == 0) return results();
  if (plan.positions.count() == 0) {
    const size_t bytes = shape[0] * shape[1] * (dtype == Dtype::float64 ? 8 : 4);
    for (const Tensor& sum : sums) memset(sum.mutable_data_ptr(), 0, bytes);
    return results();
  }
  plan.a = y.const_data_ptr();
  plan.g = task.out = g.mutable_data_ptr();
  for (int k = 0; k < 3; ++k) plan.sums[k] = sums[k].mutable_data_ptr();
  task.rest = rest ? rest->const_data_ptr() : nullptr;
  task.low = low;
  task.high = high;
  choose_path(plan);
  if (plan.path == Path::squares && plan.channel.a == 1) plan.path = Path::columns;  // few channels, all the same
  require(plan.path != Path::squares && plan.positions.depth == 1, "y is neither contiguous nor channels last");
  const auto kernel = kernels().clamp_backward[int(dtype)];
  run_plan(plan, dtype, 3, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("clamp_backward_", TORCH_BOX(&clamp_backward_)); }

}  // namespace fastscore::cpu
