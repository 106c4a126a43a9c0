#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"

namespace fastscore::cpu {
namespace {

// out[k]: [N, C], k below Count; update(sums, a, g) adds one element.
template <int Count, class Update>
std::vector<Tensor> reduce(const Tensor& a, const Tensor& g, int64_t channel_dim, Update update) {
  const auto sizes = a.sizes();
  const auto strides_a = a.strides(), strides_g = g.strides();
  const int64_t dims = a.dim();
  require(dims == g.dim() && a.scalar_type() == g.scalar_type(), "a and g must have one shape and dtype");
  if (channel_dim < 0) channel_dim += dims;
  require(channel_dim > 0 && channel_dim < dims, "channel_dim must be a dimension other than 0");
  std::vector<int64_t> position_dims;
  int64_t positions = 1;
  for (int64_t d = 1; d < dims; ++d) {
    if (d == channel_dim) continue;
    position_dims.push_back(d);
    positions *= sizes[d];
  }
  for (int64_t d = 0; d < dims; ++d) require(sizes[d] == g.sizes()[d], "a and g must have one shape");
  const int64_t samples = sizes[0], channels = sizes[channel_dim];
  const bool wide = a.scalar_type() == ScalarType::Double;
  std::vector<Tensor> out;
  for (int k = 0; k < Count; ++k)
    out.push_back(new_output({samples, channels}, wide ? ScalarType::Double : ScalarType::Float));
  with_type(a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* pa = static_cast<const T*>(a.const_data_ptr());
    const T* pg = static_cast<const T*>(g.const_data_ptr());
    torch::stable::parallel_for(0, samples * channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / channels, c = row % channels;
        const T* ra = pa + n * strides_a[0] + c * strides_a[channel_dim];
        const T* rg = pg + n * strides_g[0] + c * strides_g[channel_dim];
        double sums[Count] = {};
        for (int64_t p = 0; p < positions; ++p) {
          int64_t rest = p, oa = 0, og = 0;
          for (int i = int(position_dims.size()) - 1; i >= 0; --i) {
            const int64_t d = position_dims[i], index = rest % sizes[d];
            rest /= sizes[d];
            oa += index * strides_a[d];
            og += index * strides_g[d];
          }
          update(sums, double(ra[oa]), double(rg[og]));
        }
        for (int k = 0; k < Count; ++k) {
          if (wide) static_cast<double*>(out[k].data_ptr())[row] = sums[k];
          else static_cast<float*>(out[k].data_ptr())[row] = float(sums[k]);
        }
      }
    });
  });
  return out;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  return reduce<1>(a, g, channel_dim, [](double* s, double x, double y) { s[0] += x * y; })[0];
}

std::tuple<Tensor, Tensor, Tensor> channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto out = reduce<3>(a, g, channel_dim, [](double* s, double x, double y) {
    s[0] += x * y;
    s[1] += x;
    s[2] += y;
  });
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor> channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto out = reduce<2>(a, g, channel_dim, [](double* s, double x, double y) {
    s[0] += std::abs(x * y);
    s[1] += x * y * x * y;
  });
  return {out[0], out[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cpu
