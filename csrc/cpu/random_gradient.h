// Random output gradients. Compiled once per tier; the loops over blocks are what the compiler vectorises.
#pragma once

#include "../math.h"
#include "dispatch.h"
#include "simd.h"

namespace fastscore::cpu::FASTSCORE_TIER {

// So many blocks that the compiler vectorises over them before it unrolls.
constexpr int kBlocks = 32, kValues = 4 * kBlocks;

// The values of kBlocks Philox blocks, kValues classes in order.
FASTSCORE_INLINE void random_values(const RandomGradient& task, uint64_t id, uint32_t first_block, float* values) {
  uint32_t word[4][kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    word[0][i] = first_block + i;
    word[1][i] = task.probe;
    word[2][i] = uint32_t(id);
    word[3][i] = uint32_t(id >> 32);
  }
  uint32_t k0 = uint32_t(task.seed), k1 = uint32_t(uint64_t(task.seed) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kBlocks; ++i) philox_round(word[0][i], word[1][i], word[2][i], word[3][i], k0, k1);
    philox_next_key(k0, k1);
  }
  float lane[4][kBlocks];
  if (task.normal) {
    for (int pair = 0; pair < 4; pair += 2) {
      for (int i = 0; i < kBlocks; ++i) {
        float cosine, sine;
        const float radius = box_muller_radius(word[pair][i]);
        box_muller_angle(word[pair + 1][i], &cosine, &sine);
        lane[pair][i] = radius * cosine;
        lane[pair + 1][i] = radius * sine;
      }
    }
  } else {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < kBlocks; ++i) lane[j][i] = rademacher(word[j][i]);
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    for (int j = 0; j < 4; ++j) values[4 * i + j] = lane[j][i];
  }
}

inline void random_gradient(const RandomGradient& task, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const uint64_t id = uint64_t(task.sample_ids[n * task.id_stride]);
    float* row = task.out + n * task.classes;
    double squares[8] = {};
    for (int64_t k = 0; k < task.classes; k += kValues) {
      float values[kValues];
      random_values(task, id, uint32_t(k / 4), values);
      const int count = task.classes - k < kValues ? int(task.classes - k) : kValues;
      for (int i = count; i < kValues; ++i) values[i] = 0;
      memcpy(row + k, values, count * sizeof(float));
      for (int i = 0; i < kValues; i += 8) {
        for (int j = 0; j < 8; ++j) squares[j] += double(values[i + j]) * values[i + j];
      }
    }
    if (!task.normalize) continue;
    double sum = 0;
    for (double square : squares) sum += square;
    const double scale = 1 / __builtin_sqrt(sum);
    for (int64_t k = 0; k < task.classes; ++k) row[k] = float(row[k] * scale);
  }
}

}  // namespace fastscore::cpu::FASTSCORE_TIER
