// Gradients scaled to length 1, sample by sample. Compiled once per tier.
#pragma once

#include "dispatch.h"
#include "operands.h"

namespace fastscore::cpu::FASTSCORE_TIER {

typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));

// GCC would take a whole vector's conversion apart.
#if FASTSCORE_VECTOR_BYTES == 64
FASTSCORE_INLINE Doubles to_doubles(HalfFloats x) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)x); }
FASTSCORE_INLINE HalfFloats to_floats(Doubles x) { return (HalfFloats)_mm512_maskz_cvtpd_ps(0xff, (__m512d)x); }
#else
FASTSCORE_INLINE Doubles to_doubles(HalfFloats x) { return __builtin_convertvector(x, Doubles); }
FASTSCORE_INLINE HalfFloats to_floats(Doubles x) { return __builtin_convertvector(x, HalfFloats); }
#endif

// A vector of T's sums as vectors of double, and back.
template <std::size_t... I>
FASTSCORE_INLINE void split(Vector<float> x, Doubles (&parts)[2], std::index_sequence<I...>) {
  constexpr int kHalf = sizeof...(I);
  parts[0] = to_doubles(__builtin_shufflevector(x, x, I...));
  parts[1] = to_doubles(__builtin_shufflevector(x, x, (kHalf + I)...));
}
FASTSCORE_INLINE void split(Vector<float> x, Doubles (&parts)[2]) {
  split(x, parts, std::make_index_sequence<kVectorBytes / 8>());
}
FASTSCORE_INLINE void split(Vector<double> x, Doubles (&parts)[1]) { parts[0] = x; }

template <std::size_t... I>
FASTSCORE_INLINE Vector<float> joined(const Doubles (&parts)[2], std::index_sequence<I...>) {
  return __builtin_shufflevector(to_floats(parts[0]), to_floats(parts[1]), I...);
}
FASTSCORE_INLINE Vector<float> joined(const Doubles (&parts)[2]) {
  return joined(parts, std::make_index_sequence<kVectorBytes / 4>());
}
FASTSCORE_INLINE Vector<double> joined(const Doubles (&parts)[1]) { return parts[0]; }

template <class T>
constexpr int kParts = sizeof(Sum<T>) == 8 ? 1 : 2;

// Σ x² over a stretch of elements, lane by lane.
template <class T, class Operand>
FASTSCORE_INLINE void add_squares(Operand x, int64_t length, Doubles* squares) {
  constexpr int kW = kWidth<T>;
  const auto add = [&](Vector<T> elements, Doubles* to) {
    Doubles parts[kParts<T>];
    split(elements, parts);
    for (int part = 0; part < kParts<T>; ++part) to[part] += parts[part] * parts[part];
  };
  int64_t i = 0;
  for (; i + 2 * kW <= length; i += 2 * kW) {
    add(x.at(i), squares);
    add(x.at(i + kW), squares + kParts<T>);
  }
  if (i + kW <= length) {
    add(x.at(i), squares);
    i += kW;
  }
  if (i < length) add(x.at(i, int(length - i)), squares + kParts<T>);
}

// A divisor of 0, or so small that its inverse is infinite, gives 0; NaN gives NaN.
template <class T, class Operand>
FASTSCORE_INLINE void divide(Operand x, T* out, int64_t step, int64_t length, double divisor) {
  constexpr int kW = kWidth<T>;
  const bool divides = !(divisor < 0x1p-1022);
  const double factor = 1 / divisor;  // exact enough for what is rounded to 24 bits or fewer
  // In two floats, where they hold it: x · high + x · low is then rounded once, as in double.
  const bool holds = kMultiplyAdd && sizeof(T) < 8 && factor > 0x1p-90 && factor < 0x1p90;
  const float high = float(factor), low = float(factor - high);
  const auto quotients = [&](Vector<T> elements) {
    if constexpr (sizeof(T) < 8) {
      if (holds) return multiply_add(elements, Vector<T>{} + high, elements * low);
    }
    Doubles parts[kParts<T>];
    split(elements, parts);
    for (Doubles& part : parts) part = !divides ? Doubles{} : sizeof(T) < 8 ? part * factor : part / divisor;
    return joined(parts);
  };
  T apart[kW];
  for (int64_t i = 0; i < length; i += kW) {
    const int n = length - i < kW ? int(length - i) : kW;
    const Vector<T> unit = quotients(n == kW ? x.at(i) : x.at(i, n));
    store_elements(step == 1 ? out + i : apart, unit, n);
    for (int j = 0; step != 1 && j < n; ++j) out[(i + j) * step] = apart[j];
  }
}

template <class T>
void normalize_gradient(const NormalizeGradient& task, int64_t begin, int64_t end) {
  const Dim inner = task.elements.inner();
  const int64_t count = task.elements.count();
  for (int64_t n = begin; n < end; ++n) {
    const T* in = static_cast<const T*>(task.in) + n * task.sample.a;
    T* out = static_cast<T*>(task.out) + n * task.sample.g;
    Doubles squares[2 * kParts<T>] = {};
    double sum = 0;
    const auto stretches = [&](auto f) {
      task.elements.runs(0, count, [&](int64_t offset_in, int64_t offset_out, int64_t length) {
        if (inner.a == 1) {
          f(Dense<T>{in + offset_in, 1}, out + offset_out, length);
        } else {
          f(Strided<T>{in + offset_in, inner.a}, out + offset_out, length);
        }
      });
    };
    stretches([&](auto x, T*, int64_t length) { add_squares<T>(x, length, squares); });
    for (const Doubles& lanes : squares) {
      for (int lane = 0; lane < int(sizeof lanes / 8); ++lane) sum += lanes[lane];
    }
    const double norm = __builtin_sqrt(sum), divisor = norm < task.eps ? task.eps : norm;
    stretches([&](auto x, T* to, int64_t length) { divide<T>(x, to, inner.g, length, divisor); });
    static_cast<Sum<T>*>(task.norm)[n] = Sum<T>(norm);
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
