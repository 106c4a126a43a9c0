// Calls every CUDA op from a fresh thread with tensors on the second of two devices, and prints what it did: a line of
// op, layout, launches, allocations, and the devices that have a context then.
#include "devices.h"

#include "channel_sums.cu"
#include "clamp_backward.cu"
#include "normalize_gradient.cu"
#include "random_gradient.cu"

#include <cstdio>

namespace {

using namespace fastscore::cuda;

std::set<std::string> called{"cuda_runtime"};  // which asks no device

template <class Op>
void run(const char* name, const char* how, Op op) {
  devices = {.contexts = {wanted}};
  called.insert(name);
  op();
  if (devices.of_torch != 0) devices.wrong += "PyTorch's device is not what it was\n";
  std::printf("%s,%s,%d,%d,", name, how, devices.did["launch"], devices.did["allocation"]);
  for (const int device : devices.contexts) std::printf("%d", device);
  std::printf("\n%s", devices.wrong.c_str());
}

void run_all(const char* how, std::vector<int64_t> shape, bool channels_last) {
  const Tensor a(shape, ScalarType::BFloat16, channels_last), g = a;
  run("channel_dot", how, [&] { channel_dot(a, g, 1); });
  run("channel_sums", how, [&] { channel_sums(a, g, 1, true); });
  run("channel_powers", how, [&] { channel_powers(a, g, 1); });
  run("clamp_backward_", how, [&] { clamp_backward_(a, g, std::nullopt, 0, 6, true); });
}

}  // namespace

int main() {
  run_all("whole", {32, 256, 7, 7}, false);
  run_all("split", {2, 8, 112, 112}, true);
  run("normalize_gradient", "one pass", [] { normalize_gradient(Tensor({8, 1000}, ScalarType::Float), 0); });
  run("normalize_gradient", "split", [] { normalize_gradient(Tensor({1, 1 << 22}, ScalarType::Float), 0); });
  run("random_gradient", "",
      [] { random_gradient(Tensor({8}, ScalarType::Long), 1000, 0, 0, "normal", true, ScalarType::Half); });
  return called == registered ? 0 : 1;
}
