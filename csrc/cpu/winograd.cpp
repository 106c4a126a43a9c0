#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include "dispatch.h"
#include "tensor_args.h"

namespace fastscore::cpu {
namespace {

// Transformed weights up to this size stay in a processor's last cache, and are read anew for a few tiles each.
constexpr int64_t kWeightBytes = int64_t{16} << 20;
constexpr int64_t kFewTiles = 14, kManyTiles = 84;

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

bool channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Tensor winograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
                int64_t padding_y, int64_t padding_x, double low, double high) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && channels_last(x),
                  "x has to be float32 [N, C, H, W] in channels last; use "
                  "x.float().contiguous(memory_format=torch.channels_last)");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(padding_y >= 0 && padding_x >= 0 && sizes[2] + 2 * padding_y >= 3 && sizes[3] + 2 * padding_x >= 3,
                  "x is ", sizes[2], " high and ", sizes[3], " wide with ", padding_y, " and ", padding_x,
                  " of padding, smaller than a 3x3 kernel; pad it");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                      outputs >= 0 && weight.sizes()[0] == 36 && weight.sizes()[1] == (outputs + kPanel - 1) / kPanel &&
                      weight.sizes()[2] == sizes[1] && weight.sizes()[3] == kPanel,
                  "weight has to be contiguous float32 [36, ceil(outputs / 32), C, 32]; transform the convolution's");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                            bias->sizes()[0] == outputs),
                  "bias has to be contiguous float32 [", outputs, "], one for each output");
  Winograd task{};
  task.height = sizes[2];
  task.width = sizes[3];
  task.channels = sizes[1];
  task.padding_y = padding_y;
  task.padding_x = padding_x;
  task.out_height = sizes[2] + 2 * padding_y - 2;
  task.out_width = sizes[3] + 2 * padding_x - 2;
  task.outputs = outputs;
  task.low = float(low);
  task.high = float(high);
  const int64_t shape[] = {sizes[0], outputs, task.out_height, task.out_width};
  const int64_t strides[] = {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, shape, strides, aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  const int64_t tiles = sizes[0] * task.tiles_y() * task.tiles_x();
  if (tiles == 0 || outputs == 0) return out;
  task.in = static_cast<const float*>(x.const_data_ptr());
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  task.out = static_cast<float*>(out.mutable_data_ptr());
  const int64_t weight_bytes = 36 * task.panels() * kPanel * task.channels * int64_t(sizeof(float));
  task.block = weight_bytes <= kWeightBytes ? kFewTiles : kManyTiles;
  torch::stable::parallel_for(0, tiles, kFewTiles, [&](int64_t begin, int64_t end) {
    Winograd part = task;
    part.block = std::min(task.block, end - begin);
    const std::unique_ptr<float[], Free> scratch(
        static_cast<float*>(::operator new[](part.scratch() * sizeof(float), std::align_val_t{64})));
    kernels().winograd(part, begin, end, scratch.get());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) { m.impl("winograd", TORCH_BOX(&winograd)); }

}  // namespace fastscore::cpu
