#include "dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace fastscore::cpu {
namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("FASTSCORE_SIMD");
  const std::string name = wanted ? wanted : "";
#ifdef __x86_64__
  if (has_v4() && (name.empty() || name == v4::kernels.tier)) return v4::kernels;
  if (has_v3() && (name.empty() || name == v3::kernels.tier)) return v3::kernels;
#endif
  if (name.empty() || name == baseline::kernels.tier) return baseline::kernels;
  STD_TORCH_CHECK(false, "FASTSCORE_SIMD is ", name,
                  ", which is not a tier that this processor has; unset it, or "
                  "use baseline, x86-64-v3 or x86-64-v4");
}

std::string simd_tier() { return kernels().tier; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(fastscore, CompositeExplicitAutograd, m) { m.impl("simd_tier", TORCH_BOX(&simd_tier)); }

}  // namespace fastscore::cpu
