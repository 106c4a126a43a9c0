#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <string>

#include "../math.h"
#include "dispatch.h"
#include "tensor_args.h"

namespace fastscore::cpu {
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
  const int64_t shape[] = {sample_ids.sizes()[0], classes};
  const Tensor out = new_output(shape, 2, Dtype::float32);
  const auto result = [&] {
    return dtype.value_or(ScalarType::Float) == ScalarType::Float ? out : torch::stable::to(out, dtype);
  };
  if (shape[0] == 0 || classes == 0) return result();
  const RandomGradient task{static_cast<const int64_t*>(sample_ids.const_data_ptr()),
                            sample_ids.strides()[0],
                            classes,
                            seed,
                            uint32_t(probe),
                            distribution == "normal",
                            normalize,
                            static_cast<float*>(out.mutable_data_ptr())};
  constexpr int64_t kValuesPerThread = 8192;
  torch::stable::parallel_for(0, shape[0], kValuesPerThread / classes + 1,
                              [&](int64_t begin, int64_t end) { kernels().random_gradient(task, begin, end); });
  return result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("random_gradient", TORCH_BOX(&random_gradient)); }

}  // namespace fastscore::cpu
