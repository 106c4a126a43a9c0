#include <torch/csrc/stable/library.h>

#include <cstring>

#include "dispatch.h"
#include "run_reduction.h"
#include "tensor_args.h"

namespace fastscore::cpu {
namespace {

template <int Count>
std::array<Tensor, Count> reduce(const Tensor& a, const Tensor& g, int64_t channel_dim, Op op) {
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
  const int64_t shape[] = {reduction.sample.size, reduction.channel.size};
  std::array<Tensor, Count> sums = new_outputs<Count>(shape, 2, dtype);
  if (shape[0] == 0 || shape[1] == 0) return sums;
  if (reduction.positions.count() == 0) {  // and perhaps no memory behind the operands
    const size_t bytes = shape[0] * shape[1] * (dtype == Dtype::float64 ? 8 : 4);
    for (Tensor& sum : sums) memset(sum.mutable_data_ptr(), 0, bytes);
    return sums;
  }
  reduction.a = a.const_data_ptr();
  reduction.g = g.const_data_ptr();
  for (int k = 0; k < Count; ++k) reduction.sums[k] = sums[k].mutable_data_ptr();
  choose_path(reduction);
  const auto kernel = kernels().channel_sums[int(dtype)][op];
  run_reduction(reduction, dtype, Count, [&](int64_t begin, int64_t end) { kernel(reduction, begin, end); });
  return sums;
}

Tensor channel_dot(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  return reduce<1>(a, g, channel_dim, kDot)[0];
}

std::tuple<Tensor, Tensor, Tensor> channel_sums(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto [dot, sum_a, sum_g] = reduce<3>(a, g, channel_dim, kSums);
  return {dot, sum_a, sum_g};
}

std::tuple<Tensor, Tensor> channel_powers(const Tensor& a, const Tensor& g, int64_t channel_dim) {
  auto [absolute, square] = reduce<2>(a, g, channel_dim, kPowers);
  return {absolute, square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
  m.impl("channel_dot", TORCH_BOX(&channel_dot));
  m.impl("channel_powers", TORCH_BOX(&channel_powers));
}

}  // namespace fastscore::cpu
