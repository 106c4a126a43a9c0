// Runs CUDA kernels on the CPU: a std::thread for every CUDA thread of a block, the blocks one after the other. Enough
// of the language for csrc/cuda: indices, __syncthreads, xor shuffles, __shared__, __ldg. Every __ldg is recorded.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
using std::max;
using std::min;

inline thread_local dim3 threadIdx, blockIdx;

namespace simt {

inline constexpr int kWarp = 32;

struct Warp {
  std::barrier<> barrier;
  uint64_t slot[2][kWarp];
  explicit Warp(int lanes) : barrier(lanes) {}
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  explicit Block(int threads) : barrier(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
  }
};

inline Block* block = nullptr;
inline thread_local int shuffles = 0;

// The elements that a kernel may read through __ldg, and how often it read each.
struct Region {
  const char* base;
  int64_t count, size;
  std::unique_ptr<std::atomic<uint16_t>[]> reads;
};
inline std::vector<Region> regions;  // none: reads are not recorded
inline std::atomic<int64_t> strays{0}, packed_bytes{0}, single_bytes{0};

inline void watch(const void* base, int64_t count, int64_t size) {
  regions.push_back({static_cast<const char*>(base), count, size, std::make_unique<std::atomic<uint16_t>[]>(count)});
}

// A device refuses accesses that are not aligned to their size.
inline void check_alignment(const void* address, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) strays.fetch_add(1, std::memory_order_relaxed);
}

inline void record(const void* address, int64_t bytes) {
  constexpr auto relaxed = std::memory_order_relaxed;
  check_alignment(address, bytes);
  (bytes == 16 ? packed_bytes : single_bytes).fetch_add(bytes, relaxed);
  if (regions.empty()) return;
  for (Region& region : regions) {
    const int64_t at = static_cast<const char*>(address) - region.base;
    if (at < 0 || at + bytes > region.count * region.size) continue;
    for (int64_t i = 0; i < bytes / region.size; ++i) region.reads[at / region.size + i].fetch_add(1, relaxed);
    return;
  }
  strays.fetch_add(1, relaxed);
}

// The first split that runs: for kernels whose whole grid would take too long here.
inline int64_t first_split = 0;

struct Launch {
  int threads;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t splits, Arguments... arguments) const {
    Block state(threads);
    block = &state;
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        threadIdx = {uint32_t(t)};
        for (int64_t y = std::min(first_split, splits - 1); y < splits; ++y) {
          for (int64_t x = 0; x < blocks; ++x) {
            blockIdx = {uint32_t(x), uint32_t(y)};
            kernel(arguments...);
            state.barrier.arrive_and_wait();
          }
        }
      });
    }
    for (std::thread& thread : pool) thread.join();
  }
};

}  // namespace simt

inline void __syncthreads() { simt::block->barrier.arrive_and_wait(); }

// Two slots in turn: a thread that writes one again has passed the barrier that its readers wait at after reading.
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  simt::Warp& warp = *simt::block->warps[threadIdx.x / simt::kWarp];
  const int lane = threadIdx.x % simt::kWarp;
  uint64_t* slot = warp.slot[simt::shuffles++ % 2];
  memcpy(&slot[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  memcpy(&value, &slot[lane ^ mask], sizeof(T));
  return value;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T __ldg(const T* address) {
  simt::record(address, sizeof(T));
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return __ldg(address);
}

template <class T>
void __stcg(T* address, T value) {
  simt::check_alignment(address, sizeof(value));
  *address = value;
}
