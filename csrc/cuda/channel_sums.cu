#include "channel_sums.cuh"

#include <torch/csrc/stable/library.h>

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
Tensor reduce(const Tensor& a, const Tensor& g, int64_t channel_dim, bool mean = false) {
  if (channel_dim < 0) channel_dim += a.dim();
  check_pair(a, g, channel_dim);
  const DeviceGuard device(a);
  Tensor sums = new_sums(a, Reducer::kSums, a.size(0), a.size(channel_dim));
  with_type(a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from_a = static_cast<const T*>(a.const_data_ptr());
    const auto* from_g = static_cast<const T*>(g.const_data_ptr());
    const ChannelPlan plan =
        plan_channel_sums({from_a, from_g, sizeof(T)}, a.sizes().data(), a.strides().data(), g.strides().data(),
                          int(a.dim()), int(channel_dim), device.places<SumKernels<Reducer, T>>());
    const Tensor partials = new_partials(a, plan.geometry, Reducer::kSums);
    launch_channel_sums<Reducer>(plan, from_a, from_g, static_cast<Sum<T>*>(sums.mutable_data_ptr()),
                                 static_cast<Sum<T>*>(partials.mutable_data_ptr()), mean, device.launcher());
  });
  return sums;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) { return reduce<Dot>(a, g, channel_dim); }

// [3, N, C]: Σ a·g, Σ a or the mean of a, Σ g.
Tensor channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim, bool mean) {
  return reduce<Sums>(a, g, channel_dim, mean);
}

// [2, N, C]: Σ |a·g|, Σ (a·g)².
Tensor channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  return reduce<Powers>(a, g, channel_dim);
}

}  // namespace

// The version of CUDA that a driver has to know for these kernels to run, as 13000.
int64_t cuda_runtime() { return CUDART_VERSION; }

STABLE_TORCH_LIBRARY_IMPL(fastscore, CompositeExplicitAutograd, m) { m.impl("cuda_runtime", TORCH_BOX(&cuda_runtime)); }

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cuda
