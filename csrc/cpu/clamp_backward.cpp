#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "dispatch.h"
#include "run_reduction.h"
#include "tensor_args.h"

namespace fastscore::cpu {
namespace {

// [3, N, C], as channel_sums has them.
Tensor clamp_backward_(const Tensor& y, Tensor g, const std::optional<Tensor>& rest, double low, double high,
                       bool mean) {
  const auto sizes = y.sizes(), strides = y.strides();
  const int64_t dims = int64_t(sizes.size());
  STD_TORCH_CHECK(dims >= 2 && dims <= kMaxDims, "y has ", dims, " dimensions, but has to have 2 to ", kMaxDims,
                  "; reshape it");
  const auto check = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(sizes == x.sizes(), "y and ", name, " differ in shape; ", name,
                    " is a gradient of y, element by element");
    STD_TORCH_CHECK(strides == x.strides(), "y and ", name, " differ in strides; copy ", name,
                    ", as in torch.empty_like(y).copy_(", name, ")");
    STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "y and ", name, " differ in dtype; convert ", name, ", as in ",
                    name, ".to(y.dtype)");
  };
  check(g, "g");
  if (rest) check(*rest, "rest");
  // also under torch.inference_mode, where no kernel of autograd stands before this one
  STD_TORCH_CHECK(apart(g),
                  "g is neither contiguous nor channels last: some of its elements are one in memory, and it "
                  "is written to; pass g.clone(memory_format=torch.contiguous_format)");
  STD_TORCH_CHECK(!overlap(g, y), "g and y overlap in memory, and g is written to; pass g.clone()");
  STD_TORCH_CHECK(!rest || !overlap(g, *rest), "g and rest overlap in memory, and g is written to; pass g.clone()");
  ClampBackward task;
  Reduction& reduction = task.reduction;
  const auto dim = [&](int64_t d) { return Dim{sizes[d], strides[d], strides[d]}; };
  reduction.sample = dim(0);
  reduction.channel = dim(1);
  for (int64_t d = 2; d < dims; ++d) reduction.positions.add(dim(d));
  const Dtype dtype = dtype_of(y);
  Tensor sums;
  if (!new_sums(3, dtype, reduction, sums)) return sums;
  reduction.a = y.const_data_ptr();
  reduction.g = task.out = g.mutable_data_ptr();
  task.rest = rest ? rest->const_data_ptr() : nullptr;
  task.low = low;
  task.high = high;
  choose_path(reduction);
  STD_TORCH_CHECK(reduction.path != Path::squares && !reduction.strided && reduction.positions.depth == 1,
                  "y is neither contiguous nor channels last; copy y, g and rest, as in y.contiguous()");
  const auto kernel = kernels().clamp_backward[int(dtype)];
  run_reduction(reduction, dtype, 3, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  if (mean) divide_by_positions(reduction, dtype);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("clamp_backward_", TORCH_BOX(&clamp_backward_)); }

}  // namespace fastscore::cpu
