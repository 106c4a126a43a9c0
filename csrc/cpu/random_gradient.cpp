#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../math.h"
#include "arguments.h"

namespace fastscore::cpu {
namespace {

Tensor random_gradient(const Tensor& sample_ids, int64_t classes, int64_t seed, int64_t probe,
                       std::string distribution, bool normalize) {
  require(sample_ids.dim() == 1 && sample_ids.scalar_type() == ScalarType::Long, "sample_ids must be int64 [N]");
  require(classes >= 0, "classes must not be negative");
  const int64_t samples = sample_ids.sizes()[0];
  Tensor out = new_output({samples, classes}, ScalarType::Float);
  const auto* ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  const int64_t stride = sample_ids.strides()[0];
  const bool normal = distribution == "normal";
  auto* values = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = values + n * classes;
      double squares = 0;
      for (int64_t k = 0; k < classes; k += 4) {
        const Words words = random_words(ids[n * stride], uint32_t(k / 4), uint32_t(probe), seed);
        float lane[4];
        for (int pair = 0; pair < 4; pair += 2) {
          float cosine, sine;
          box_muller_angle(words.lane[pair + 1], &cosine, &sine);
          const float radius = box_muller_radius(words.lane[pair]);
          lane[pair] = normal ? radius * cosine : rademacher(words.lane[pair]);
          lane[pair + 1] = normal ? radius * sine : rademacher(words.lane[pair + 1]);
        }
        for (int i = 0; i < 4 && k + i < classes; ++i) {
          row[k + i] = lane[i];
          squares += double(lane[i]) * lane[i];
        }
      }
      if (!normalize) continue;
      const float scale = float(1 / std::sqrt(squares));
      for (int64_t k = 0; k < classes; ++k) row[k] *= scale;
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("random_gradient", TORCH_BOX(&random_gradient)); }

}  // namespace fastscore::cpu
