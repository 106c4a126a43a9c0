// What a row of elements is read from. Compiled once per tier.
#pragma once

#include "simd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

// How far ahead of a row's elements memory is asked for: measured, together with 16-bit conversion it is worth a
// quarter of the bandwidth beyond the caches.
constexpr int64_t kPrefetchBytes = 1536;

// A row's operand: elements next to each other, elements `step` apart, or one value that stands for the whole row.
template <class T>
struct Dense {
  const T* p;
  FASTSCORE_INLINE explicit Dense(const T* p, int64_t) : p(p) {}
  FASTSCORE_INLINE Vector<T> at(int64_t i) const { return load(p + i); }
  FASTSCORE_INLINE Vector<T> at(int64_t i, int n) const { return load(p + i, n); }
  FASTSCORE_INLINE void prefetch_from(int64_t i) const { prefetch(p + i, kPrefetchBytes); }
};

template <class T>
struct Strided {
  const T* p;
  int64_t step;
  FASTSCORE_INLINE Vector<T> at(int64_t i) const { return load_strided(p + i * step, step); }
  FASTSCORE_INLINE Vector<T> at(int64_t i, int n) const { return load_strided(p + i * step, step, n); }
  FASTSCORE_INLINE void prefetch_from(int64_t i) const {
    const int64_t bytes = kWidth<T> * step * int64_t(sizeof(T));
    for (int64_t line = 0; line < bytes && line < 256; line += 64) prefetch(p + i * step, kPrefetchBytes + line);
  }
};

template <class T>
struct Repeated {
  Sum<T> value;
  FASTSCORE_INLINE explicit Repeated(const T* p, int64_t) : value(load(p, 1)[0]) {}
  FASTSCORE_INLINE Vector<T> at(int64_t) const { return Vector<T>{} + value; }
  FASTSCORE_INLINE Vector<T> at(int64_t, int n) const { return repeat_some<Vector<T>>(value, n); }
  FASTSCORE_INLINE void prefetch_from(int64_t) const {}
};

}  // namespace fastscore::cpu::FASTSCORE_TIER
