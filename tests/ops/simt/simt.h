// Runs CUDA kernels on the CPU, the blocks one after the other. Enough of the language for csrc/cuda: indices,
// __syncthreads, xor shuffles, __shared__, __ldg. Every __ldg is recorded. The threads of a block take turns on one
// thread of the CPU, each until it waits for others; with SIMT_THREADS, for ThreadSanitizer, each is a std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef SIMT_THREADS
#include <barrier>
#include <thread>
#define SIMT_LOCAL thread_local
#else
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#define SIMT_LOCAL  // saved and put back where threads take turns
#endif

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

inline SIMT_LOCAL dim3 threadIdx, blockIdx;

namespace simt {

inline constexpr int kWarp = 32;
inline SIMT_LOCAL int shuffles = 0;  // of a thread, so far

#ifdef SIMT_THREADS

using Barrier = std::barrier<>;

template <class Body>
void run_threads(int threads, Body body) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back(body, t);
  for (std::thread& thread : pool) thread.join();
}

#else

// The threads of a launch as fibers; one launch runs at a time.
struct Fibers {
  static constexpr size_t kStack = 1 << 16;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
  };
  std::vector<Fiber> all;
  ucontext_t caller;
  std::function<void(int)> body;
  int count = 0, current = 0, idle = 0;  // idle: turns in a row in which nobody came to a barrier

  // The next that is not done, or the current one again.
  int next() const {
    int at = current;
    do at = (at + 1) % count;
    while (all[at].done && at != current);
    return at;
  }

  void yield() {
    if (++idle > count) {
      std::fputs("a thread of the block never comes to the barrier that the others wait at\n", stderr);
      std::abort();
    }
    const dim3 thread = threadIdx, of_grid = blockIdx;
    const int shuffled = shuffles, from = current;
    current = next();
    swapcontext(&all[from].context, &all[current].context);
    threadIdx = thread, blockIdx = of_grid, shuffles = shuffled;
  }

  static void start();

  void run(int threads) {
    if (int(all.size()) < threads) all.resize(threads);
    count = threads, current = idle = 0;
    for (int t = 0; t < threads; ++t) {
      all[t].done = false;
      getcontext(&all[t].context);
      all[t].context.uc_stack.ss_sp = all[t].stack.get();
      all[t].context.uc_stack.ss_size = kStack;
      all[t].context.uc_link = nullptr;
      makecontext(&all[t].context, start, 0);
    }
    swapcontext(&caller, &all[0].context);
  }
};
inline Fibers fibers;

inline void Fibers::start() {
  shuffles = 0;
  fibers.body(fibers.current);
  fibers.all[fibers.current].done = true;
  fibers.idle = 0;
  const int to = fibers.next();
  if (to == fibers.current) setcontext(&fibers.caller);  // the last
  fibers.current = to;
  setcontext(&fibers.all[to].context);
}

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void arrive_and_wait() {
    fibers.idle = 0;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
      return;
    }
    for (const int64_t phase = phase_; phase == phase_;) fibers.yield();
  }

 private:
  int threads_, arrived_ = 0;
  int64_t phase_ = 0;
};

template <class Body>
void run_threads(int threads, Body body) {
  fibers.body = body;
  fibers.run(threads);
}

#endif

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];
  explicit Warp(int lanes) : barrier(lanes) {}
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  explicit Block(int threads) : barrier(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
  }
};

inline Block* block = nullptr;

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
    run_threads(threads, [&](int t) {
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
