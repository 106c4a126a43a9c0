// Gradients scaled to length 1, sample by sample. Compiled once per tier.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

// Σ x² over a stretch of elements `stride` apart, added to 8 independent sums.
template <class T>
FASTSCORE_INLINE void add_squares(const T* x, int64_t stride, int64_t length, double* squares) {
  int64_t i = 0;
  for (; i + 8 <= length; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const double value = to_double(x[(i + j) * stride]);
      squares[j] += value * value;
    }
  }
  for (; i < length; ++i) squares[0] += to_double(x[i * stride]) * to_double(x[i * stride]);
}

// A divisor of 0, or so small that its inverse is infinite, gives 0; NaN gives NaN.
template <class T>
FASTSCORE_INLINE void divide(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t length, double divisor) {
  const bool divides = !(divisor < 0x1p-1022);
  const double factor = 1 / divisor;  // exact enough for what is rounded to 24 bits or fewer
  for (int64_t i = 0; i < length; ++i) {
    const double value = to_double(x[i * x_stride]);
    from_double(!divides ? 0.0 : sizeof(T) < 8 ? value * factor : value / divisor, &out[i * out_stride]);
  }
}

template <class T>
void normalize_gradient(const NormalizeGradient& task, int64_t begin, int64_t end) {
  const Dim inner = task.elements.inner();
  const int64_t count = task.elements.count();
  for (int64_t n = begin; n < end; ++n) {
    const T* in = static_cast<const T*>(task.in) + n * task.sample.a;
    T* out = static_cast<T*>(task.out) + n * task.sample.g;
    double squares[8] = {}, sum = 0;
    task.elements.runs(0, count, [&](int64_t offset, int64_t, int64_t length) {
      if (inner.a == 1) {
        add_squares(in + offset, 1, length, squares);
      } else {
        add_squares(in + offset, inner.a, length, squares);
      }
    });
    for (double square : squares) sum += square;
    const double norm = __builtin_sqrt(sum), divisor = norm < task.eps ? task.eps : norm;
    task.elements.runs(0, count, [&](int64_t offset_in, int64_t offset_out, int64_t length) {
      if (inner.a == 1 && inner.g == 1) {
        divide(in + offset_in, 1, out + offset_out, 1, length, divisor);
      } else {
        divide(in + offset_in, inner.a, out + offset_out, inner.g, length, divisor);
      }
    });
    static_cast<Sum<T>*>(task.norm)[n] = Sum<T>(norm);
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
