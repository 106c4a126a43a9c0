// From stable-ABI tensors to what the kernels take: checks, pointers, outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace fastscore::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(message);
}

inline Tensor new_output(std::vector<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int i = int(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// f(T{}) with the C++ type of a floating dtype.
template <class F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: throw std::runtime_error("unsupported dtype: use float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastscore::cpu
