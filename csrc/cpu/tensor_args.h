// Between stable-ABI tensors and the torch-free kernels: dtypes and outputs. What an op checks is the last line of
// defence for callers of torch.ops; the functions of fastscore.ops explain more.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <utility>

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
  const int64_t strides[] = {dims == 2 ? std::max<int64_t>(sizes[1], 1) : 1, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, dtype == Dtype::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <int Count>
std::array<Tensor, Count> new_outputs(const int64_t* sizes, int dims, Dtype dtype) {
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    return std::array<Tensor, Count>{((void)I, new_output(sizes, dims, dtype))...};
  }(std::make_index_sequence<Count>());
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
