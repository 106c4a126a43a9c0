// A random gradient per sample, a pure function of (seed, sample id, probe, class). A thread keeps its first four
// values until the norm is known, and makes those that follow twice: cheaper than writing, reading back and writing
// again.
#pragma once

#include "../math.h"
#include "elements.cuh"
#include "geometry.cuh"

namespace fastscore::cuda {

struct RandomPlan {
  int64_t samples, classes;
  int64_t id_stride;
  int lanes;
  int64_t blocks;
};

inline RandomPlan plan_random_gradient(int64_t samples, int64_t id_stride, int64_t classes) {
  RandomPlan it{samples, classes, id_stride, 1, 0};
  it.lanes = power_of_two_from(ceil_divide(classes, 4), kThreads);
  it.blocks = ceil_divide(samples, kThreads / it.lanes);
  return it;
}

template <bool kNormal>
__device__ __forceinline__ void random_values(const Words& words, float (&value)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if constexpr (kNormal) {
      const float radius = box_muller_radius(words.lane[i]);
      box_muller_angle(words.lane[i + 1], &value[i], &value[i + 1]);
      value[i] *= radius;
      value[i + 1] *= radius;
    } else {
      value[i] = rademacher(words.lane[i]);
      value[i + 1] = rademacher(words.lane[i + 1]);
    }
  }
}

// out: [N, K]
template <bool kNormal, class T>
__global__ void __launch_bounds__(kThreads, 2)
    random_rows(const int64_t* ids, RandomPlan it, int64_t seed, uint32_t probe, bool normalize, T* out) {
  const int lane = threadIdx.x & (it.lanes - 1);
  const int64_t n = int64_t(blockIdx.x) * (kThreads / it.lanes) + threadIdx.x / it.lanes;
  const bool inside = n < it.samples;
  const int64_t id = inside ? ids[n * it.id_stride] : 0, quads = inside ? (it.classes + 3) / 4 : 0;
  const auto make = [&](int64_t quad, float (&value)[4]) {
    random_values<kNormal>(random_words(id, uint32_t(quad), probe, seed), value);
  };
  float first[4] = {};
  if (lane < quads) make(lane, first);
  float factor = 1;
  if (normalize) {
    double squares[1] = {0};
    const auto add = [&](int64_t quad, const float (&value)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * quad + i < it.classes) squares[0] += double(value[i]) * value[i];
      }
    };
    if (lane < quads) add(lane, first);
    for (int64_t quad = lane + it.lanes; quad < quads; quad += it.lanes) {
      float value[4];
      make(quad, value);
      add(quad, value);
    }
    sum_over_lanes(squares, it.lanes);
    factor = float(1 / sqrt(squares[0]));
  }
  const auto write = [&](int64_t quad, float (&value)[4]) {
    T* to = out + n * it.classes + 4 * quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] *= factor;
    if (it.classes % 4 == 0) {
      store_four(to, value);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * quad + i < it.classes) to[i] = narrow<T>(value[i]);
      }
    }
  };
  if (lane < quads) write(lane, first);
  for (int64_t quad = lane + it.lanes; quad < quads; quad += it.lanes) {
    float value[4];
    make(quad, value);
    write(quad, value);
  }
}

// launch as for launch_channel_sums.
template <class T, class Launch>
void launch_random_gradient(const RandomPlan& it, const int64_t* ids, int64_t seed, uint32_t probe, bool normal,
                            bool normalize, T* out, Launch launch) {
  if (it.samples == 0 || it.classes == 0) return;
  launch(normal ? random_rows<true, T> : random_rows<false, T>, it.blocks, int64_t(1), ids, it, seed, probe, normalize,
         out);
}

}  // namespace fastscore::cuda
