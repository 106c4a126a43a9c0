// Arithmetic that every backend shares: compiled by the host compiler, by nvcc, and by the tests. Knows nothing of
// torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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
constexpr int kPhiloxRounds = 10;
// Blocks are numbered in 32 bits, four words each.
constexpr int64_t kMaxClasses = int64_t{1} << 34;

FASTSCORE_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t product0 = uint64_t{0xD2511F53} * c0;
  const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
  c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
  c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
  c1 = uint32_t(product1);
  c3 = uint32_t(product0);
}

FASTSCORE_HD void philox_next_key(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9;
  k1 += 0xBB67AE85;
}

FASTSCORE_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    philox_next_key(k0, k1);
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

// Box-Muller takes u = m / 2²⁵ from a word, m = 2 (word >> 8) + 1: odd, so u is never 0 or 1, nor a quarter turn.
FASTSCORE_HD uint32_t odd_uniform(uint32_t word) { return 2 * (word >> 8) + 1; }

// sqrt(-2 ln u). No branches, so that loops over it vectorise.
FASTSCORE_HD float box_muller_radius(uint32_t word) {
  constexpr uint32_t kOne = 1u << 25, kRootHalf = 23726566;  // u = 1, u = √½
  const uint32_t m = odd_uniform(word);
  // u = 2ᵏ (1 + f) with 1 + f in [√½, √2). Near 1, where ln u needs more bits than the float nearest u has, f = u - 1
  // is exact.
  const float u = float(int32_t(m)) * 0x1p-25f;
  int32_t bits;
  memcpy(&bits, &u, sizeof bits);
  const bool near_one = m > kRootHalf;
  const int32_t k = near_one ? 0 : (bits - 0x3f3504f3) >> 23;
  const int32_t mantissa_bits = bits - int32_t(uint32_t(k) << 23);
  float mantissa;
  memcpy(&mantissa, &mantissa_bits, sizeof mantissa);
  const float f = near_one ? float(int32_t(m) - int32_t(kOne)) * 0x1p-25f : mantissa - 1.0f;
  // ln(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
  const float s = f / (2.0f + f), s2 = s * s;
  const float series = 0.66666667f + s2 * (0.4f + s2 * (0.28571429f + s2 * 0.22222222f));
  const float logarithm = float(k) * 0.69314718f + (2.0f * s + s * s2 * series);
  return sqrtf(-2.0f * logarithm);
}

// cos 2πu and sin 2πu. No branches either.
FASTSCORE_HD void box_muller_angle(uint32_t word, float* cosine, float* sine) {
  const uint32_t m = odd_uniform(word);
  const uint32_t quadrant = (m + (1u << 22)) >> 23;
  // What is left of a quarter turn, in [-½, ½]: exact. Series of sin(π/2 t) and cos(π/2 t), π/2 in two parts.
  const float t = float(int32_t(m) - int32_t(quadrant << 23)) * 0x1p-23f, t2 = t * t;
  const float s =
      t * 1.5707964f +
      t * (-4.371139e-8f + t2 * (-0.64596410f + t2 * (0.079692626f + t2 * (-0.0046817541f + t2 * 0.00016044118f))));
  const float c = 1.0f + t2 * (-1.2337006f +
                               t2 * (0.25366951f + t2 * (-0.020863481f + t2 * (0.00091926027f + t2 * -2.5202042e-5f))));
  const bool swap = quadrant & 1;
  *cosine = (swap ? s : c) * ((quadrant + 1) & 2 ? -1.0f : 1.0f);
  *sine = (swap ? c : s) * (quadrant & 2 ? -1.0f : 1.0f);
}

}  // namespace fastscore
