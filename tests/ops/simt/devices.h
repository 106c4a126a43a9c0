// Stand-ins for what csrc/cuda/*.cu take of PyTorch's stable ABI and of the CUDA runtime, so that the host's side of
// every op runs without a device, and tells which device was current when anything was asked for. Nothing is computed.
#pragma once

#include <dlfcn.h>

#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

#include "simt.h"

// Two devices. PyTorch and this library's own CUDA runtime have a current device each, 0 in a fresh thread.
struct Devices {
  int of_torch = 0, of_runtime = 0;
  std::set<int> contexts;          // devices that have one; each costs hundreds of megabytes
  std::map<std::string, int> did;  // what was done, and how often
  std::string wrong;

  void touch(const char* what, int device) {
    ++did[what];
    contexts.insert(of_runtime);
    if (of_torch != device || of_runtime != device) wrong += std::string(what) + " while another device is current\n";
  }
};
inline Devices devices;
inline int wanted = 1;  // the device of every tensor

enum cudaError_t { cudaSuccess, cudaErrorInsufficientDriver };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
using cudaStream_t = int*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
#define CUDART_VERSION 13000

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = devices.of_runtime, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  devices.contexts.insert(devices.of_runtime = device);  // as it has been since CUDA 12
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 132 : 9;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
  devices.touch("occupancy", wanted);
  return *blocks = 3, cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(Parameters...), Arguments&&...) {
  devices.touch("launch", wanted);
  if (*config->stream != wanted) devices.wrong += "a launch on another device's stream\n";
  return cudaSuccess;
}

// aoti_torch_get_current_cuda_stream, as launch.h finds it.
inline int32_t stream_of(int32_t device, void** stream) {
  static int streams[] = {0, 1};
  return *stream = &streams[device], 0;
}
using AOTITorchError = int32_t;
#define dlopen(...) (&devices)
#define dlsym(...) reinterpret_cast<void*>(&stream_of)

template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}
#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) refuse(__VA_ARGS__)

namespace torch::headeronly {
enum class ScalarType { Float, Double, BFloat16, Half, Long };
}

namespace torch::stable {

using headeronly::ScalarType;

struct Integers {
  const int64_t* values;
  size_t count;
  const int64_t* data() const { return values; }
  bool operator==(const Integers& other) const { return std::equal(values, values + count, other.values); }
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(std::vector<int64_t> sizes, ScalarType dtype, bool channels_last = false) : sizes_(sizes), dtype_(dtype) {
    strides_.resize(sizes.size());
    int64_t step = channels_last ? sizes[1] : 1;
    for (int d = int(sizes.size()) - 1; d >= 0; --d) {
      if (channels_last && d == 1) strides_[d] = 1;
      else strides_[d] = step, step *= sizes[d];
    }
  }
  bool is_cuda() const { return true; }
  int get_device_index() const { return wanted; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  Integers sizes() const { return {sizes_.data(), sizes_.size()}; }
  Integers strides() const { return {strides_.data(), strides_.size()}; }
  int64_t numel() const { return std::accumulate(sizes_.begin(), sizes_.end(), int64_t(1), std::multiplies<>()); }
  const void* const_data_ptr() const { return nullptr; }
  void* mutable_data_ptr() const { return nullptr; }

 private:
  std::vector<int64_t> sizes_, strides_;
  ScalarType dtype_ = ScalarType::Float;
};

inline Tensor new_empty(const Tensor&, Integers shape, ScalarType dtype) {
  devices.touch("allocation", wanted);
  return {std::vector<int64_t>(shape.values, shape.values + shape.count), dtype};
}
inline Tensor empty_like(const Tensor& x) {
  devices.touch("allocation", wanted);
  return x;
}

namespace accelerator {
// Restores a device only if that has a context, as PyTorch does.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(devices.of_torch) { devices.contexts.insert(devices.of_torch = device); }
  ~DeviceGuard() {
    devices.of_torch = before_;
    if (devices.contexts.contains(before_)) devices.of_runtime = before_;
  }

 private:
  int before_;
};
}  // namespace accelerator
}  // namespace torch::stable

inline std::set<std::string> registered;
struct Registration {
  template <class Op>
  void impl(const char* name, Op) {
    registered.insert(name);
  }
};
#define TORCH_BOX(op) (op)
#define FASTSCORE_JOINED(name, line) name##line
#define FASTSCORE_NAMED(name, line) FASTSCORE_JOINED(name, line)
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m)                         \
  static void FASTSCORE_NAMED(key##_registers_, __LINE__)(Registration m); \
  static const bool FASTSCORE_NAMED(key##_registered_, __LINE__) =         \
      (FASTSCORE_NAMED(key##_registers_, __LINE__)(Registration{}), true); \
  static void FASTSCORE_NAMED(key##_registers_, __LINE__)(Registration m)
