#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "tensor_args.h"

namespace fastscore::cpu {
namespace {

std::tuple<Tensor, Tensor> normalize_gradient(const Tensor& g, double eps) {
  const auto sizes = g.sizes(), strides = g.strides();
  STD_TORCH_CHECK(sizes.size() >= 1 && sizes.size() <= kMaxDims, "g has ", sizes.size(),
                  " dimensions, but has to have 1 to ", kMaxDims, "; reshape it");
  const Dtype dtype = dtype_of(g);
  const Tensor unit = torch::stable::empty_like(g);
  const auto unit_strides = unit.strides();
  const Tensor norm = new_output(sizes.data(), 1, dtype);
  if (sizes[0] == 0) return {unit, norm};
  NormalizeGradient task;
  task.sample = {sizes[0], strides[0], unit_strides[0]};
  for (size_t d = 1; d < sizes.size(); ++d) task.elements.add({sizes[d], strides[d], unit_strides[d]});
  task.elements.collapse();
  task.eps = eps;
  task.in = g.const_data_ptr();
  task.out = unit.mutable_data_ptr();
  task.norm = norm.mutable_data_ptr();
  const auto kernel = kernels().normalize_gradient[int(dtype)];
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t grain = kElementsPerThread / std::max<int64_t>(task.elements.count(), 1) + 1;
  torch::stable::parallel_for(0, sizes[0], grain, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  return {unit, norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("normalize_gradient", TORCH_BOX(&normalize_gradient)); }

}  // namespace fastscore::cpu
