// Elements in memory: how they are loaded, widened to the type that sums are kept in, and rounded back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace fastscore::cuda {

inline constexpr int kThreads = 256;  // of every block
inline constexpr int kWarp = 32;
inline constexpr int kBlocksAtOnce = 3;        // on one multiprocessor: leaves 80 registers to a thread
inline constexpr int kColumnBlocksAtOnce = 4;  // columns make do with 64
inline constexpr int kRowBlocksAtOnce = 4;     // so do rows

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class S>
__device__ __forceinline__ T narrow(S x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(float(x));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(float(x));
  else return T(x);
}

template <class T>
__device__ __forceinline__ Sum<T> load(const T* address) {
  return widen(__ldg(address));
}

// What one 16-byte load brings.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* address) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

// Element j of a pack. Of two bfloat16 in a word, each is a float32 once the other's bits are out of its way.
template <class T>
__device__ __forceinline__ Sum<T> widen(const Pack<T>& pack, int j) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t word[4];
    memcpy(word, &pack, sizeof(word));
    const uint32_t bits = j % 2 ? word[j / 2] & 0xffff0000u : word[j / 2] << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    return widen(pack.value[j]);
  }
}

// What this kernel writes later: the read-only path of __ldg is for what nobody does.
template <class T>
__device__ __forceinline__ Pack<T> load_pack_to_change(const T* address) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(address));
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  __stcg(reinterpret_cast<uint4*>(address), bits);  // an assignment may be taken apart into four
}

// Four values side by side, at a multiple of the four's size.
template <class T>
__device__ __forceinline__ void store_four(T* address, const float (&value)[4]) {
  if constexpr (sizeof(T) == 8) {
    store_pack(address, Pack<T>{{T(value[0]), T(value[1])}});
    store_pack(address + 2, Pack<T>{{T(value[2]), T(value[3])}});
  } else if constexpr (sizeof(T) == 4) {
    store_pack(address, Pack<T>{{value[0], value[1], value[2], value[3]}});
  } else {
    const T four[] = {narrow<T>(value[0]), narrow<T>(value[1]), narrow<T>(value[2]), narrow<T>(value[3])};
    uint2 bits;
    memcpy(&bits, four, sizeof(bits));
    __stcg(reinterpret_cast<uint2*>(address), bits);
  }
}

// Elements before the first 16-byte boundary that both runs of `length` share; all of them where they share none.
template <class T, class U>
__device__ __forceinline__ int64_t elements_to_boundary(const T* a, const U* g, int64_t length) {
  const uint32_t past_a = uint32_t(reinterpret_cast<uintptr_t>(a)) % 16;
  const uint32_t past_g = uint32_t(reinterpret_cast<uintptr_t>(g)) % 16;
  const int64_t head = (16 - past_a) % 16 / sizeof(T);
  return past_a == past_g && head < length ? head : length;
}

// Quotient of numbers that are not negative; int64 division is several times as slow as uint32, and rarely needed.
__device__ __forceinline__ int64_t divide(int64_t number, int64_t divisor) {
  return (number | divisor) >> 32 ? number / divisor : int64_t(uint32_t(number) / uint32_t(divisor));
}

// Replaces each value by its sum over `lanes` neighbouring threads (a power of two, one for the whole block), in an
// order that depends on nothing else. Every thread of the block must call it, and at most once in a kernel.
template <class S, int kCount>
__device__ __forceinline__ void sum_over_lanes(S (&value)[kCount], int lanes) {
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value[k] += __shfl_xor_sync(0xffffffffu, value[k], step);
  }
  if (lanes <= kWarp) return;
  __shared__ S of_warp[kCount][kThreads / kWarp];
  const int warp = threadIdx.x / kWarp, warps = lanes / kWarp, first = warp & -warps;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) of_warp[k][warp] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    value[k] = of_warp[k][first];
    for (int i = 1; i < warps; ++i) value[k] += of_warp[k][first + i];
  }
}

}  // namespace fastscore::cuda
