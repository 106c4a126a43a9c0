// The schema of every op, whichever device its kernels are for.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastscore, m) {
  m.def("channel_sums(Tensor a, Tensor g, int channel_dim=1, bool mean=False) -> Tensor");
  m.def("channel_dot(Tensor a, Tensor g, int channel_dim=1) -> Tensor");
  m.def("channel_powers(Tensor a, Tensor g, int channel_dim=1) -> Tensor");
  m.def(
      "random_gradient(Tensor sample_ids, int classes, int seed, int probe=0, str distribution=\"normal\", "
      "bool normalize=True, ScalarType? dtype=None) -> Tensor");
  m.def("normalize_gradient(Tensor g, float eps=0.0) -> (Tensor, Tensor)");
  m.def("clamp_backward_(Tensor y, Tensor(a!) g, Tensor? rest, float low, float high, bool mean=False) -> Tensor");
  m.def(
      "winograd(Tensor x, Tensor weight, Tensor? bias, int outputs, int padding_y, int padding_x, float low, "
      "float high) -> Tensor");
  m.def("simd_tier() -> str");
  m.def("cuda_runtime() -> int");
}
