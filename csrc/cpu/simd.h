// Vectors of one SIMD tier. Included once per tier, which defines FASTSCORE_TIER and FASTSCORE_VECTOR_BYTES.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "reduction.h"

#define FASTSCORE_INLINE inline __attribute__((always_inline))

namespace fastscore::cpu::FASTSCORE_TIER {

constexpr int kVectorBytes = FASTSCORE_VECTOR_BYTES;

// What elements of type T are summed in: float64 for float64, else float32.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<Sum<T>>::type;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(Sum<T>);

typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

FASTSCORE_INLINE Vector<float> widen(bf16, HalfBits x) {
#if FASTSCORE_VECTOR_BYTES == 64
  const Bits wide = (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif FASTSCORE_VECTOR_BYTES == 32
  const Bits wide = (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
  const Bits wide = __builtin_convertvector(x, Bits);
#endif
  return (Vector<float>)(wide << 16);
}

FASTSCORE_INLINE Vector<float> widen(fp16, HalfBits x) {
#if FASTSCORE_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif FASTSCORE_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps((__m128i)x);
#else
  // Moving the exponent field into place leaves a value 2¹¹² too small, subnormals included.
  const Bits wide = __builtin_convertvector(x, Bits), magnitude = (wide & 0x7fff) << 13;
  const Bits scaled = (Bits)((Vector<float>)magnitude * 0x1p112f);
  const Bits not_finite = (Bits)(magnitude >= 0x0f800000u);
  return (Vector<float>)(scaled | (not_finite & 0x7f800000) | ((wide & 0x8000) << 16));
#endif
}

FASTSCORE_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}

FASTSCORE_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTSCORE_INLINE Vector<T> load(const T* p) {
  HalfBits v;
  memcpy(&v, p, sizeof v);
  return widen(T{}, v);
}

// The first n elements, n below the width (load_bits: up to it), and zeros; reads no other byte.
#if FASTSCORE_VECTOR_BYTES == 64
FASTSCORE_INLINE Vector<float> load(const float* p, int n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}

FASTSCORE_INLINE Vector<double> load(const double* p, int n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}

template <class T>
FASTSCORE_INLINE Vector<T> load(const T* p, int n) {
  return widen(T{}, (HalfBits)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}

FASTSCORE_INLINE HalfBits load_bits(const uint16_t* p, int n) {
  return (HalfBits)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
}
#else
template <class T>
FASTSCORE_INLINE Vector<T> load(const T* p, int n) {
  T copy[kWidth<T>] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(static_cast<const T*>(copy));
}

FASTSCORE_INLINE HalfBits load_bits(const uint16_t* p, int n) {
  HalfBits v = {};
  if (n == int(sizeof v / 2)) {
    memcpy(&v, p, sizeof v);
    return v;
  }
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
#endif

// x · y + z, rounded once where the tier has an instruction for it.
constexpr bool kMultiplyAdd = kVectorBytes > 16;
FASTSCORE_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
#if FASTSCORE_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif FASTSCORE_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}

template <class V, std::size_t... I>
FASTSCORE_INLINE V every_second(V x, V y, std::index_sequence<I...>) {
  constexpr int kLanes = sizeof...(I);
  return __builtin_shufflevector(x, y, (2 * I < kLanes ? 2 * I : 2 * I + 1)...);
}

// Elements `step` apart; reads nothing behind the last.
template <class T>
FASTSCORE_INLINE Vector<T> load_strided(const T* p, int64_t step) {
  constexpr int kW = kWidth<T>;
  if (step == 2) return every_second(load(p), load(p + kW - 1), std::make_index_sequence<kW>());
  if constexpr (sizeof(T) == 2) {
    HalfBits v;
    for (int i = 0; i < kW; ++i) v[i] = p[i * step].bits;
    return widen(T{}, v);
  } else {
    Vector<T> v;
    for (int i = 0; i < kW; ++i) v[i] = p[i * step];
    return v;
  }
}

// The first n of them, n below the width, and zeros.
template <class T>
FASTSCORE_INLINE Vector<T> load_strided(const T* p, int64_t step, int n) {
  constexpr int kW = kWidth<T>;
  if (step == 2) {
    const Vector<T> x = 2 * n > kW ? load(p) : load(p, 2 * n - 1);
    const Vector<T> y = 2 * n > kW ? load(p + kW - 1, 2 * n - kW) : Vector<T>{};
    return every_second(x, y, std::make_index_sequence<kW>());
  }
  T copy[kW] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i * step];
  return load(static_cast<const T*>(copy));
}

template <class V, class S>
FASTSCORE_INLINE void store(S* p, V v) {
  memcpy(p, &v, sizeof v);
}

// The first n lanes, n up to the width.
template <class V, class S>
FASTSCORE_INLINE void store_some(S* p, V v, int n) {
  if (n == int(sizeof v / sizeof(S))) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

// Rounded to nearest, ties to even.
FASTSCORE_INLINE HalfBits narrow(bf16, Vector<float> x) {
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HalfBits);
}

FASTSCORE_INLINE HalfBits narrow(fp16, Vector<float> x) {
#if FASTSCORE_VECTOR_BYTES == 64
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif FASTSCORE_VECTOR_BYTES == 32
  return (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfBits narrow;
  for (int i = 0; i < kWidth<fp16>; ++i) {
    fp16 value;
    from_double(x[i], &value);
    narrow[i] = value.bits;
  }
  return narrow;
#endif
}

// The first n lanes, n up to the width, as elements of type T.
template <class T>
FASTSCORE_INLINE void store_elements(T* p, Vector<T> v, int n) {
  if constexpr (sizeof(T) == 2) {
    const HalfBits elements = narrow(T{}, v);
    store_some(&p->bits, elements, n);
  } else {
    store_some(p, v, n);
  }
}

// The first n lanes, n up to the width, of `wide`, which is what `from` holds; 0 where the lane of `not_these` is set.
template <class T, class M>
FASTSCORE_INLINE void store_unless(M not_these, T* p, const T* from, Vector<T> wide, int n) {
  if constexpr (sizeof(T) == 2) {  // without rounding anew
    typedef int16_t HalfMask __attribute__((vector_size(kVectorBytes / 2)));
    const HalfBits elements = load_bits(&from->bits, n);
    store_some(&p->bits, elements & ~(HalfBits) __builtin_convertvector(not_these, HalfMask), n);
  } else {
    store_some(p, not_these ? Vector<T>{} : wide, n);
  }
}

FASTSCORE_INLINE Vector<float> absolute(Vector<float> x) { return (Vector<float>)((Bits)x & 0x7fffffffu); }

FASTSCORE_INLINE Vector<double> absolute(Vector<double> x) {
  typedef uint64_t Bits64 __attribute__((vector_size(kVectorBytes)));
  return (Vector<double>)((Bits64)x & 0x7fffffffffffffffull);
}

// value in the first n lanes, 0 in the rest.
template <class V, class S>
FASTSCORE_INLINE V repeat_some(S value, int n) {
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  typedef Int Ints __attribute__((vector_size(kVectorBytes)));
  Ints index;
  for (int i = 0; i < int(sizeof(V) / sizeof(S)); ++i) index[i] = i;
  return (V)((Ints)(V{} + value) & (Ints)(index < Int(n)));
}

template <class V, std::size_t... I>
FASTSCORE_INLINE V add_neighbours(V x, V y, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, y, (2 * I)...) + __builtin_shufflevector(x, y, (2 * I + 1)...);
}

// Lane i of the result is the sum of lanes of v[i]; as many vectors as lanes.
template <int Lanes, int Count = Lanes, class V>
FASTSCORE_INLINE V sum_lanes(const V* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    const V x = sum_lanes<Lanes, Count / 2>(v), y = sum_lanes<Lanes, Count / 2>(v + Count / 2);
    return add_neighbours(x, y, std::make_index_sequence<Lanes>());
  }
}

template <int Half, class V, std::size_t... I>
FASTSCORE_INLINE V interleave(V x, V y, std::index_sequence<I...>) {
  constexpr int kLanes = sizeof...(I);
  return __builtin_shufflevector(x, y, (Half * kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Lane i of v[j] and lane j of v[i] change places; as many vectors as lanes.
template <int Lanes, class V>
FASTSCORE_INLINE void transpose(V* v) {
  constexpr auto kLane = std::make_index_sequence<Lanes>();
  for (int stage = 1; stage < Lanes; stage *= 2) {
    V mixed[Lanes];
    for (int i = 0; i < Lanes / 2; ++i) {
      mixed[2 * i] = interleave<0>(v[i], v[i + Lanes / 2], kLane);
      mixed[2 * i + 1] = interleave<1>(v[i], v[i + Lanes / 2], kLane);
    }
    for (int i = 0; i < Lanes; ++i) v[i] = mixed[i];
  }
}

FASTSCORE_INLINE void prefetch(const void* p, int64_t bytes) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes);
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
