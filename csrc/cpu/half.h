// The two 16-bit formats, one value at a time; vectors of them are in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastscore::cpu {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class Dtype { float32, float64, bfloat16, float16 };

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline double to_double(double x) { return x; }
inline double to_double(float x) { return x; }
inline double to_double(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline double to_double(fp16 x) {
  // Moving the exponent field into place leaves a value 2¹¹² too small, subnormals included.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
}

// Rounds to nearest, ties to even; by way of float, as PyTorch does.
inline void from_double(double x, double* out) { *out = x; }
inline void from_double(double x, float* out) { *out = float(x); }
inline void from_double(double x, bf16* out) {
  const uint32_t bits = bits_of(float(x));
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_double(double x, fp16* out) {
  const uint32_t bits = bits_of(float(x)), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 2¹⁶ and more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2⁻¹⁴: adding ½ shifts the subnormal into the low bits and rounds it
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

}  // namespace fastscore::cpu
