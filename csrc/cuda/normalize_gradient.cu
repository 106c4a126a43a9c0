#include "normalize_gradient.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launch.h"

namespace fastscore::cuda {
namespace {

std::tuple<Tensor, Tensor> normalize_gradient(const Tensor& g, double eps) {
  STD_TORCH_CHECK(g.dim() >= 1 && g.dim() <= kMaxDims, "g has ", g.dim(), " dimensions, but has to have 1 to ",
                  kMaxDims, "; reshape it");
  const DeviceGuard device(g);
  const Tensor unit = torch::stable::empty_like(g);
  const int64_t samples = g.size(0);
  const Tensor norm = torch::stable::new_empty(g, {&samples, 1}, sum_dtype(g.scalar_type()));
  with_type(g.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(g.const_data_ptr());
    auto* to = static_cast<T*>(unit.mutable_data_ptr());
    const NormalizePlan plan = plan_normalize_gradient(from, to, sizeof(T), g.sizes().data(), g.strides().data(),
                                                       unit.strides().data(), int(g.dim()), device.multiprocessors());
    const int64_t parts = plan.held ? 0 : samples * plan.split.splits;
    const Tensor partials = torch::stable::new_empty(g, {&parts, 1}, ScalarType::Double);
    launch_normalize_gradient(plan, from, eps, to, static_cast<Sum<T>*>(norm.mutable_data_ptr()),
                              static_cast<double*>(partials.mutable_data_ptr()), device.launcher());
  });
  return {unit, norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("normalize_gradient", TORCH_BOX(&normalize_gradient)); }

}  // namespace fastscore::cuda
