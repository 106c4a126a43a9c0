#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "run_reduction.h"
#include "tensor_args.h"

namespace fastscore::cpu {
namespace {

Tensor reduce(const Tensor& a, const Tensor& g, int64_t channel_dim, Op op, int count, bool mean = false) {
  const auto sizes = a.sizes(), strides_a = a.strides(), strides_g = g.strides();
  const int64_t dims = int64_t(sizes.size());
  STD_TORCH_CHECK(sizes == g.sizes(), "a and g differ in shape; g is the gradient of a, element by element");
  STD_TORCH_CHECK(a.scalar_type() == g.scalar_type(), "a and g differ in dtype; convert one, as in g.to(a.dtype)");
  STD_TORCH_CHECK(dims >= 2 && dims <= kMaxDims, "a has ", dims, " dimensions, but has to have 2 to ", kMaxDims,
                  "; reshape it");
  if (channel_dim < 0) channel_dim += dims;
  STD_TORCH_CHECK(channel_dim > 0 && channel_dim < dims,
                  "channel_dim has to name a dimension other than 0, which counts the samples");

  Reduction reduction;
  const auto dim = [&](int64_t d) { return Dim{sizes[d], strides_a[d], strides_g[d]}; };
  reduction.sample = dim(0);
  reduction.channel = dim(channel_dim);
  for (int64_t d = 1; d < dims; ++d) {
    if (d != channel_dim) reduction.positions.add(dim(d));
  }
  const Dtype dtype = dtype_of(a);
  Tensor sums;
  if (!new_sums(count, dtype, reduction, sums)) return sums;
  reduction.a = a.const_data_ptr();
  reduction.g = g.const_data_ptr();
  choose_path(reduction);
  const auto kernel = kernels().channel_sums[int(dtype)][op];
  run_reduction(reduction, dtype, count, [&](int64_t begin, int64_t end) { kernel(reduction, begin, end); });
  if (mean) divide_by_positions(reduction, dtype);
  return sums;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) { return reduce(a, g, channel_dim, kDot, 1); }

// [3, N, C]: Σ a·g, Σ a or the mean of a, Σ g.
Tensor channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim, bool mean) {
  return reduce(a, g, channel_dim, kSums, 3, mean);
}

// [2, N, C]: Σ |a·g|, Σ (a·g)².
Tensor channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  return reduce(a, g, channel_dim, kPowers, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cpu
