#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"

namespace fastscore::cpu {
namespace {

std::tuple<Tensor, Tensor> normalize_gradient(const Tensor& input, double eps) {
  const Tensor g = torch::stable::contiguous(input);
  Tensor unit = torch::stable::empty_like(g);
  const int64_t samples = g.sizes()[0], width = samples ? g.numel() / samples : 0;
  const bool wide = g.scalar_type() == ScalarType::Double;
  Tensor norm = new_output({samples}, wide ? ScalarType::Double : ScalarType::Float);
  with_type(g.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(g.const_data_ptr());
    T* out = static_cast<T*>(unit.data_ptr());
    for (int64_t n = 0; n < samples; ++n) {
      double squares = 0;
      for (int64_t k = 0; k < width; ++k) squares += double(in[n * width + k]) * double(in[n * width + k]);
      const double length = std::sqrt(squares), divisor = length < eps ? eps : length;
      for (int64_t k = 0; k < width; ++k) {
        const double x = double(in[n * width + k]);
        out[n * width + k] = T(divisor > 0 ? x / divisor : 0.0);
      }
      if (wide) static_cast<double*>(norm.data_ptr())[n] = length;
      else static_cast<float*>(norm.data_ptr())[n] = float(length);
    }
  });
  return {unit, norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("normalize_gradient", TORCH_BOX(&normalize_gradient)); }

}  // namespace fastscore::cpu
