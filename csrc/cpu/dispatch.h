// The kernels of one SIMD tier behind function pointers, and the tier for this machine.
#pragma once

#include "reduction.h"

namespace fastscore::cpu {

enum Op { kDot, kSums, kPowers };

struct RandomGradient {
  const int64_t* sample_ids;
  int64_t id_stride, classes, seed;
  uint32_t probe;
  bool normal, normalize;
  float* out;  // [N, K]
};

struct NormalizeGradient {
  Dim sample;     // strides: a of the input, g of the output
  Dims elements;  // of one sample
  double eps;
  const void* in;
  void* out;
  void* norm;  // [N]
};

struct ClampBackward {
  Reduction reduction;  // a is the clamp's result, g the gradient from one of its readers; all have the same strides
  const void* rest;     // the gradient from the other readers; may be null
  void* out;            // the memory of g: nothing else need be fetched to be written to
  double low, high;
};

constexpr int kTile = 4;    // outputs of a tile of Winograd's, in height and width
constexpr int kPanel = 32;  // outputs whose transformed weights lie beside each other

struct WinogradTile {
  int64_t sample, y, x;
};

struct Winograd {
  const float* in;      // [N, height, width, channels]
  const float* weight;  // transformed: [36, panels, channels, kPanel]
  const float* bias;    // [outputs]; may be null
  float* out;           // [N, out_height, out_width, outputs]
  int64_t height, width, channels, padding_y, padding_x;
  int64_t out_height, out_width, outputs;
  int64_t block;  // tiles at a time, at most
  float low, high;

  int64_t tiles_y() const { return (out_height + kTile - 1) / kTile; }
  int64_t tiles_x() const { return (out_width + kTile - 1) / kTile; }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  WinogradTile tile(int64_t i) const { return {i / tiles_x() / tiles_y(), i / tiles_x() % tiles_y(), i % tiles_x()}; }
  int64_t scratch() const { return 36 * block * (channels + panels() * kPanel); }  // floats
};

struct Kernels {
  const char* tier;
  void (*channel_sums[4][3])(const Reduction& reduction, int64_t begin, int64_t end);        // items; [Dtype][Op]
  void (*random_gradient)(const RandomGradient& task, int64_t begin, int64_t end);           // samples
  void (*normalize_gradient[4])(const NormalizeGradient& task, int64_t begin, int64_t end);  // samples; [Dtype]
  void (*clamp_backward[4])(const ClampBackward& task, int64_t begin, int64_t end);          // items; [Dtype]
  void (*winograd)(const Winograd& task, int64_t begin, int64_t end, float* scratch);        // tiles
};

namespace baseline {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}

// Whether this processor runs a tier: by features, as GCC before 12 and clang before 18 know no levels by name.
// Processors that have these have the rest of the level too (F16C, LZCNT, MOVBE).
inline bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
inline bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The widest tier that the processor has, or the one that the environment variable FASTSCORE_SIMD names (baseline,
// x86-64-v3, x86-64-v4); chosen once.
const Kernels& kernels();

}  // namespace fastscore::cpu
