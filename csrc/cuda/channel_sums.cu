#include "channel_sums.cuh"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "launch.h"

namespace fastscore::cuda {
namespace {

void check_pair(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  STD_TORCH_CHECK(a.is_cuda() && g.is_cuda() && a.get_device_index() == g.get_device_index(),
                  "a and g are on different devices; move one of them, as in g.to(a.device)");
  STD_TORCH_CHECK(a.scalar_type() == g.scalar_type(), "a and g differ in dtype; convert one, as in g.to(a.dtype)");
  STD_TORCH_CHECK(a.dim() >= 2 && a.dim() <= kMaxDims, "a has ", a.dim(), " dimensions, but has to have 2 to ",
                  kMaxDims, "; reshape it");
  STD_TORCH_CHECK(a.dim() == g.dim(), "a and g differ in shape; g is the gradient of a, element by element");
  for (int64_t d = 0; d < a.dim(); ++d) {
    STD_TORCH_CHECK(a.size(d) == g.size(d), "a and g differ in size at dimension ", d,
                    "; g is the gradient of a, element by element");
  }
  STD_TORCH_CHECK(channel_dim > 0 && channel_dim < a.dim(),
                  "channel_dim has to name a dimension other than 0, which counts the samples");
}

template <class Reducer>
std::array<Tensor, Reducer::kSums> reduce(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  constexpr int kSums = Reducer::kSums;
  if (channel_dim < 0) channel_dim += a.dim();
  check_pair(a, g, channel_dim);
  const DeviceGuard device(a);
  const int64_t shape[] = {a.size(0), a.size(channel_dim)};
  const auto allocate = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(a, {sizes.begin(), sizes.size()}, sum_dtype(a.scalar_type()));
  };
  std::array<Tensor, kSums> result;
  for (Tensor& sum : result) sum = allocate({shape[0], shape[1]});
  with_type(a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from_a = static_cast<const T*>(a.const_data_ptr());
    const auto* from_g = static_cast<const T*>(g.const_data_ptr());
    const ChannelPlan plan =
        plan_channel_sums({from_a, from_g, sizeof(T)}, a.sizes().data(), a.strides().data(), g.strides().data(),
                          int(a.dim()), int(channel_dim), device.multiprocessors());
    Sum<T>* sums[kSums];
    for (int k = 0; k < kSums; ++k) sums[k] = static_cast<Sum<T>*>(result[k].mutable_data_ptr());
    const int64_t splits = plan.geometry.split.splits;
    const Tensor partials = allocate({splits == 1 ? 0 : splits * kSums * shape[0] * shape[1]});
    launch_channel_sums<Reducer>(plan, from_a, from_g, sums, static_cast<Sum<T>*>(partials.mutable_data_ptr()),
                                 device.launcher());
  });
  return result;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) { return reduce<Dot>(a, g, channel_dim)[0]; }

std::tuple<Tensor, Tensor, Tensor> channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  const auto [dot, sum_a, sum_g] = reduce<Sums>(a, g, channel_dim);
  return {dot, sum_a, sum_g};
}

std::tuple<Tensor, Tensor> channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  const auto [absolute, squares] = reduce<Powers>(a, g, channel_dim);
  return {absolute, squares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cuda
