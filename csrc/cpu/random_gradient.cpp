#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "arguments.h"
#include "kernels.h"

namespace fastscore::cpu {
namespace {

Tensor random_gradient(const Tensor& sample_ids, int64_t classes, int64_t seed, int64_t probe,
                       std::string distribution, bool normalize) {
  require(sample_ids.dim() == 1 && sample_ids.scalar_type() == ScalarType::Long, "sample_ids has to be int64 [N]");
  require(classes >= 0 && classes <= int64_t{1} << 34, "classes is out of range");
  require(probe >= 0 && probe < int64_t{1} << 32, "probe is out of range");
  require(distribution == "normal" || distribution == "rademacher", "distribution has to be normal or rademacher");
  const int64_t shape[] = {sample_ids.sizes()[0], classes};
  const Tensor out = new_output(shape, 2, Dtype::float32);
  if (shape[0] == 0 || classes == 0) return out;
  const RandomGradient task{static_cast<const int64_t*>(sample_ids.const_data_ptr()), sample_ids.strides()[0], classes,
                            seed, uint32_t(probe), distribution == "normal", normalize,
                            static_cast<float*>(out.mutable_data_ptr())};
  constexpr int64_t kValuesPerThread = 8192;
  torch::stable::parallel_for(0, shape[0], kValuesPerThread / classes + 1, [&](int64_t begin, int64_t end) {
    kernels().random_gradient(task, begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("random_gradient", TORCH_BOX(&random_gradient)); }

}  // namespace fastscore::cpu
