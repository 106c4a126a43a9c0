#include "random_gradient.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "launch.h"

namespace fastscore::cuda {
namespace {

Tensor random_gradient(const Tensor& sample_ids, int64_t classes, int64_t seed, int64_t probe, std::string distribution,
                       bool normalize, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.scalar_type() == ScalarType::Long,
                  "sample_ids has to be int64 [N]; use sample_ids.to(torch.int64).flatten()");
  STD_TORCH_CHECK(classes >= 0 && classes <= kMaxClasses, "classes is ", classes,
                  ", but has to be 0 to 2**34, the number of words that a sample has");
  STD_TORCH_CHECK(probe >= 0 && probe <= std::numeric_limits<uint32_t>::max(), "probe is ", probe,
                  ", but has to be 0 to 2**32 - 1; number probes from 0");
  STD_TORCH_CHECK(distribution == "normal" || distribution == "rademacher", "distribution is '", distribution,
                  "', but has to be 'normal' or 'rademacher'");
  const DeviceGuard device(sample_ids);
  const int64_t shape[] = {sample_ids.size(0), classes};
  const ScalarType type = dtype.value_or(ScalarType::Float);
  const Tensor out = torch::stable::new_empty(sample_ids, {shape, 2}, type);
  with_type(type, [&](auto element) {
    launch_random_gradient(plan_random_gradient(shape[0], sample_ids.stride(0), classes),
                           static_cast<const int64_t*>(sample_ids.const_data_ptr()), seed, uint32_t(probe),
                           distribution == "normal", normalize, static_cast<decltype(element)*>(out.mutable_data_ptr()),
                           device.launcher());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CUDA, m) { m.impl("random_gradient", TORCH_BOX(&random_gradient)); }

}  // namespace fastscore::cuda
