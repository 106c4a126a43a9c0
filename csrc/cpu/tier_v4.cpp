#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Standard headers come first: an inline function of theirs compiled for this tier could be the one the linker keeps.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif

#define FASTSCORE_TIER v4
#define FASTSCORE_TIER_NAME "x86-64-v4"
#define FASTSCORE_VECTOR_BYTES 64
#include "dispatch_table.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
