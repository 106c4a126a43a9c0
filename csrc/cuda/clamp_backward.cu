#include "clamp_backward.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "launch.h"

namespace fastscore::cuda {
namespace {

Tensor clamp_backward_(const Tensor& y, Tensor g, const std::optional<Tensor>& rest, double low, double high,
                       bool mean) {
  STD_TORCH_CHECK(y.dim() >= 2 && y.dim() <= kMaxDims, "y has ", y.dim(), " dimensions, but has to have 2 to ",
                  kMaxDims, "; reshape it");
  const auto check_gradient = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(y.is_cuda() && x.is_cuda() && y.get_device_index() == x.get_device_index(), "y and ", name,
                    " are on different devices; move one of them");
    STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "y and ", name, " differ in dtype; convert ", name, ", as in ",
                    name, ".to(y.dtype)");
    STD_TORCH_CHECK(y.sizes() == x.sizes(), "y and ", name, " differ in shape; ", name,
                    " is a gradient of y, element by element");
    STD_TORCH_CHECK(y.strides() == x.strides(), "y and ", name, " differ in strides; copy ", name,
                    ", as in torch.empty_like(y).copy_(", name, ")");
  };
  check_gradient(g, "g");
  if (rest) check_gradient(*rest, "rest");
  const DeviceGuard device(y);
  Tensor sums = new_sums(y, Sums::kSums, y.size(0), y.size(1));
  with_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(y.const_data_ptr());
    const ClampBackward<T> task{static_cast<T*>(g.mutable_data_ptr()),
                                rest ? static_cast<const T*>(rest->const_data_ptr()) : nullptr, low, high};
    const ChannelPlan plan =
        plan_channel_sums({from, task.g, sizeof(T), task.rest}, y.sizes().data(), y.strides().data(),
                          y.strides().data(), int(y.dim()), 1, device.places<ClampKernels<T>>());
    STD_TORCH_CHECK(plan.geometry.layout != Layout::strided || y.numel() == 0,
                    "y is neither contiguous nor channels last; copy y, g and rest, as in y.contiguous()");
    const Tensor partials = new_partials(y, plan.geometry, Sums::kSums);
    launch_clamp_backward(plan, from, task, static_cast<Sum<T>*>(sums.mutable_data_ptr()),
                          static_cast<Sum<T>*>(partials.mutable_data_ptr()), mean, device.launcher());
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("clamp_backward_", TORCH_BOX(&clamp_backward_)); }

}  // namespace fastscore::cuda
