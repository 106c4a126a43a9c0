// From stable-ABI tensors to a launch: the device, its stream, outputs and errors. Nothing here waits for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "elements.cuh"

namespace fastscore::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int kOldestMajor = 8;  // compute capability of the oldest target, sm_80

inline constexpr const char* kOldDriver =
    "; update the NVIDIA driver, or use Triton's kernels with fastscore.ops.use_backend(\"triton\")";

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "fastscore's CUDA kernels: ", what, " failed: ", cudaGetErrorString(status),
                  status == cudaErrorInsufficientDriver ? kOldDriver : "");
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Makes a tensor's device the current one, and the former one current again at the end. The CUDA runtime is linked
// statically, so this library sets its own.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : device_(tensor.get_device_index()) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device_);
    if (major >= kOldestMajor) return;
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device_);
    restore();
    STD_TORCH_CHECK(false, "cuda:", device_, " has compute capability ", major, ".", minor,
                    ", but fastscore's CUDA kernels need ", kOldestMajor,
                    ".0 or newer; move the tensors to the CPU, or use fastscore.ops.use_backend(\"reference\")");
  }
  ~DeviceGuard() { restore(); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, device_); }

  // Launches kernels of `blocks` × `splits` blocks on the caller's stream.
  auto launcher() const {
    const auto stream = static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device_).nativeHandle());
    return [stream](auto kernel, int64_t blocks, int64_t splits, auto... arguments) {
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "a tensor of ", blocks,
                      " blocks of rows is more than one CUDA launch takes; split the batch");
      kernel<<<dim3(uint32_t(blocks), uint32_t(splits)), kThreads, 0, stream>>>(arguments...);
      check(cudaGetLastError(), "a launch");
    };
  }

 private:
  void restore() const {
    if (former_ != device_) cudaSetDevice(former_);
  }

  int device_, former_ = 0;
};

// f(T{}) with the CUDA type of a floating dtype.
template <class F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "unsupported dtype; convert to float32, bfloat16, float16 or float64");
  }
}

// dtype of a sum over elements of `dtype`.
inline ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

}  // namespace fastscore::cuda
