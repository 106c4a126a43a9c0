// Stand-in for CUDA's header of this name.
#pragma once

#include "simt.h"

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
