// Between stable-ABI tensors and the torch-free kernels: dtypes and outputs. What an op checks is the last line of
// defence for callers of torch.ops; the functions of fastscore.ops explain more.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "reduction.h"

namespace fastscore::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "unsupported dtype; convert to float32, bfloat16, float16 or float64");
  }
}

// A contiguous tensor for results of inputs of `dtype`: float64 for float64, else float32.
inline Tensor new_output(const int64_t* sizes, int dims, Dtype dtype) {
  int64_t strides[3];
  for (int d = dims - 1; d >= 0; --d)
    strides[d] = d == dims - 1 ? 1 : strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// [count, N, C], or [N, C] for one, for the sums of a reduction, which learns where each lies; zeros where there is
// nothing to add up, and then false.
inline bool new_sums(int count, Dtype dtype, Reduction& reduction, Tensor& sums) {
  const int64_t shape[] = {count, reduction.sample.size, reduction.channel.size}, rows = shape[1] * shape[2];
  const int64_t bytes = dtype == Dtype::float64 ? 8 : 4;
  sums = count == 1 ? new_output(shape + 1, 2, dtype) : new_output(shape, 3, dtype);
  if (rows == 0) return false;
  char* const to = static_cast<char*>(sums.mutable_data_ptr());
  if (reduction.positions.count() == 0) {  // and perhaps no memory behind the operands
    memset(to, 0, count * rows * bytes);
    return false;
  }
  for (int k = 0; k < count; ++k) reduction.sums[k] = to + k * rows * bytes;
  return true;
}

// Σ a, the second sum, over the number of positions.
inline void divide_by_positions(const Reduction& reduction, Dtype dtype) {
  const int64_t rows = reduction.sample.size * reduction.channel.size, positions = reduction.positions.count();
  const auto divide = [&](auto* sums) {
    for (int64_t i = 0; i < rows; ++i) sums[i] /= positions;
  };
  dtype == Dtype::float64 ? divide(static_cast<double*>(reduction.sums[1]))
                          : divide(static_cast<float*>(reduction.sums[1]));
}

// The bytes from the first to the last element of x: PyTorch has no negative strides.
inline std::pair<const char*, const char*> stretch(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return {nullptr, nullptr};
    last += (sizes[d] - 1) * strides[d];
  }
  const char* first = static_cast<const char*>(x.const_data_ptr());
  return {first, first + (last + 1) * int64_t(x.element_size())};
}

inline bool overlap(const Tensor& x, const Tensor& y) {
  const auto [x0, x1] = stretch(x);
  const auto [y0, y1] = stretch(y);
  return x0 < y1 && y0 < x1;
}

// Whether every element has a place of its own: each dimension steps over all that the smaller steps reach. Other
// layouts may, too; no tensor that is dense, or cut out of a dense one, has them.
inline bool apart(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t dims = sizes.size();
  for (size_t d = 0; d < dims; ++d)
    if (sizes[d] == 0) return true;
  int64_t reach = 0, below = -1;
  for (size_t count = 0; count < dims; ++count) {  // dimensions in ascending order of their strides
    size_t next = dims;
    for (size_t d = 0; d < dims; ++d)
      if (sizes[d] > 1 && strides[d] > below && (next == dims || strides[d] < strides[next])) next = d;
    if (next == dims) break;
    below = strides[next];
    for (size_t d = 0; d < dims; ++d) {
      if (sizes[d] <= 1 || strides[d] != below) continue;
      if (strides[d] <= reach) return false;
      reach += (sizes[d] - 1) * strides[d];
    }
  }
  return true;
}

}  // namespace fastscore::cpu
