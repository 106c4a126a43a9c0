// The table of one tier's kernels; a tier's source sets the target, then includes this.
#include "channel_sums.h"
#include "clamp_backward.h"
#include "dispatch.h"
#include "normalize_gradient.h"
#include "random_gradient.h"
#include "winograd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

#define FASTSCORE_OPS(T) {channel_sums<T, Dot>, channel_sums<T, Sums>, channel_sums<T, Powers>}

const Kernels kernels = {
    FASTSCORE_TIER_NAME,
    {FASTSCORE_OPS(float), FASTSCORE_OPS(double), FASTSCORE_OPS(bf16), FASTSCORE_OPS(fp16)},
    random_gradient,
    {normalize_gradient<float>, normalize_gradient<double>, normalize_gradient<bf16>, normalize_gradient<fp16>},
    {clamp_backward<float>, clamp_backward<double>, clamp_backward<bf16>, clamp_backward<fp16>},
    winograd,
};

}  // namespace fastscore::cpu::FASTSCORE_TIER
