// From stable-ABI tensors to a launch: the device, its stream, outputs and errors. Nothing here waits for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <limits>

#include "plan_channel_sums.cuh"

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

// The stream that PyTorch works on. Asked for by name, as this library must also load where PyTorch has no CUDA library
// to link to; the stable ABI's own way to it came with torch 2.13.
inline cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter,
                  "this PyTorch has no CUDA streams that fastscore's CUDA kernels can find; "
                  "use fastscore.ops.use_backend(\"triton\")");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "PyTorch does not say which CUDA stream is current");
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device the current one, and the former one current again at the end, as PyTorch does: not if that
// device has no context, which setting it would make. The CUDA runtime is linked statically, so this library sets its
// own besides, which it sets anew in each call.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : device_(tensor.get_device_index()), of_torch_(device_) {
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current != device_) check(cudaSetDevice(device_), "cudaSetDevice");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device_);
    if (major >= kOldestMajor) return;
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device_);
    STD_TORCH_CHECK(false, "cuda:", device_, " has compute capability ", major, ".", minor,
                    ", but fastscore's CUDA kernels need ", kOldestMajor,
                    ".0 or newer; move the tensors to the CPU, or use fastscore.ops.use_backend(\"composite\")");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, device_); }

  // Blocks of these kernels that run at once here.
  template <class Kernels>
  Places places() const {
    const int64_t units = multiprocessors();
    return {units * at_once<Kernels::rows>(), units * at_once<Kernels::strided>(), units * at_once<Kernels::wide>(),
            units * at_once<Kernels::narrow>()};
  }

  // Launches kernels of `blocks` × `splits` blocks on the caller's stream.
  auto launcher() const {
    return [stream = current_stream(device_)](auto kernel, int64_t blocks, int64_t splits, auto... arguments) {
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "a tensor of ", blocks,
                      " blocks of rows is more than one CUDA launch takes; split the batch");
      cudaLaunchConfig_t launch{};
      launch.gridDim = dim3(uint32_t(blocks), uint32_t(splits));
      launch.blockDim = dim3(kThreads);
      launch.stream = stream;
      check(cudaLaunchKernelEx(&launch, kernel, arguments...), "a launch");
    };
  }

 private:
  // Blocks of one kernel on one multiprocessor, asked once for each device.
  template <auto kKernel>
  int at_once() const {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];
    int blocks = device_ < kDevices ? known[device_].load(std::memory_order_relaxed) : 0;
    if (blocks == 0) {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), "asking for occupancy");
      blocks = std::max(blocks, 1);
      if (device_ < kDevices) known[device_].store(blocks, std::memory_order_relaxed);
    }
    return blocks;
  }

  int device_;
  torch::stable::accelerator::DeviceGuard of_torch_;
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

// [count, N, C], or [N, C] for one, for sums over elements of `like`.
inline Tensor new_sums(const Tensor& like, int64_t count, int64_t samples, int64_t channels) {
  const int64_t shape[] = {count, samples, channels};
  return torch::stable::new_empty(like, {shape + (count == 1), size_t(count == 1 ? 2 : 3)},
                                  sum_dtype(like.scalar_type()));
}

// The parts of sums that are split; nothing where they are not.
inline Tensor new_partials(const Tensor& like, const Geometry& it, int64_t count) {
  const int64_t parts = it.split.splits == 1 ? 0 : it.split.splits * count * it.samples * it.channels;
  return torch::stable::new_empty(like, {&parts, 1}, sum_dtype(like.scalar_type()));
}

}  // namespace fastscore::cuda
