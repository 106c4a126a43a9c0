// Arithmetic that every backend shares: compiled by the host compiler, by nvcc, and by the tests. Knows nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTSCORE_HD __host__ __device__ __forceinline__
#else
#define FASTSCORE_HD inline
#endif

namespace fastscore {

struct Words {
  uint32_t lane[4];
};

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
FASTSCORE_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The four random words of classes 4·block to 4·block + 3.
FASTSCORE_HD Words random_words(int64_t sample_id, uint32_t block, uint32_t probe, int64_t seed) {
  const uint64_t id = uint64_t(sample_id), key = uint64_t(seed);
  return philox(block, probe, uint32_t(id), uint32_t(id >> 32), uint32_t(key), uint32_t(key >> 32));
}

// -1 where the word's top bit is set, else +1.
FASTSCORE_HD float rademacher(uint32_t word) { return word >> 31 ? -1.0f : 1.0f; }

// sqrt(-2 ln u) with u = m / 2²⁵, m = 2 (word >> 8) + 1. Near u = 1 the float nearest u loses what ln needs, so the
// logarithm works on 1 - u, which is exact there.
FASTSCORE_HD float box_muller_radius(uint32_t word) {
  const uint32_t m = 2 * (word >> 8) + 1;
  const float below = float(int32_t(m)) * 0x1p-25f;
  const float above = float(int32_t((1u << 25) - m)) * 0x1p-25f;
  return sqrtf(-2.0f * (m > (1u << 24) ? log1pf(-above) : logf(below)));
}

// cos and sin of 2π u, u as above.
FASTSCORE_HD void box_muller_angle(uint32_t word, float* cosine, float* sine) {
  const uint32_t m = 2 * (word >> 8) + 1;
  const uint32_t quadrant = (m + (1u << 22)) >> 23;
  // The rest of a quarter turn, in [-½, ½], is exact in float.
  const float x = float(int32_t(m) - int32_t(quadrant << 23)) * (1.57079632679489661923f * 0x1p-23f);
  const float s = sinf(x), c = cosf(x);
  const bool swap = quadrant & 1;
  *cosine = (swap ? s : c) * ((quadrant + 1) & 2 ? -1.0f : 1.0f);
  *sine = (swap ? c : s) * (quadrant & 2 ? -1.0f : 1.0f);
}

}  // namespace fastscore
