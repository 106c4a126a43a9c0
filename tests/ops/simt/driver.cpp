// What the tests call through ctypes: csrc/cuda's planners and launches, run by the shim on host memory.
#include "simt.h"

#include "channel_sums.cuh"
#include "clamp_backward.cuh"
#include "normalize_gradient.cuh"
#include "random_gradient.cuh"

namespace {

using namespace fastscore::cuda;

template <class F>
void with_type(int dtype, F f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(double{});
    case 2: return f(__half{});
    case 3: return f(__nv_bfloat16{});
  }
}

// A buffer of NaN, or of zeros where only some splits run, with a margin of NaN that nobody may write to.
template <class S>
struct Partials {
  static constexpr int kMargin = 64;
  std::vector<S> values;
  explicit Partials(int64_t count) : values(count, simt::first_split ? S(0) : S(NAN)) {
    values.resize(count + kMargin, NAN);
  }
  void check() const {
    for (auto at = values.end() - kMargin; at != values.end(); ++at) simt::strays += *at == *at;
  }
};

int64_t parts_of(const Geometry& it, int64_t count) {
  return it.split.splits == 1 ? 0 : it.split.splits * count * it.samples * it.channels;
}

}  // namespace

extern "C" {

struct Pair {
  const void *a, *g;
  int32_t dtype, dims;
  const int64_t *sizes, *strides_a, *strides_g;
};

void watch(const void* base, int64_t count, int64_t size) { simt::watch(base, count, size); }

// How often every element of a watched region was read.
void reads_of(int32_t region, uint16_t* reads) {
  const simt::Region& it = simt::regions[region];
  for (int64_t i = 0; i < it.count; ++i) reads[i] = it.reads[i];
}

void reset() {
  simt::regions.clear();
  simt::strays = simt::packed_bytes = simt::single_bytes = 0;
}

int64_t strays() { return simt::strays; }
int64_t packed_bytes() { return simt::packed_bytes; }
int64_t single_bytes() { return simt::single_bytes; }
void start_at_split(int64_t split) { simt::first_split = split; }

ChannelPlan plan_pair(const Pair* in, int32_t channel_dim, int32_t units) {
  const int sizes[] = {4, 8, 2, 2};
  return plan_channel_sums({in->a, in->g, sizes[in->dtype]}, in->sizes, in->strides_a, in->strides_g, in->dims,
                           channel_dim, Places::of(units));
}

void channel_geometry(const Pair* in, int32_t channel_dim, int32_t units, Geometry* out) {
  *out = plan_pair(in, channel_dim, units).geometry;
}

// out: [count, N, C], the second sum as a mean if so told.
void channel_sums(const Pair* in, int32_t channel_dim, int32_t units, int32_t count, int32_t mean, void* out) {
  const ChannelPlan plan = plan_pair(in, channel_dim, units);
  const auto run = [&](auto reducer, auto type) {
    using Reducer = decltype(reducer);
    using T = decltype(type);
    Partials<Sum<T>> partials(parts_of(plan.geometry, Reducer::kSums));
    launch_channel_sums<Reducer>(plan, static_cast<const T*>(in->a), static_cast<const T*>(in->g),
                                 static_cast<Sum<T>*>(out), partials.values.data(), mean, simt::Launch{kThreads});
    partials.check();
  };
  with_type(in->dtype, [&](auto type) {
    if (count == Dot::kSums) run(Dot{}, type);
    if (count == Sums::kSums) run(Sums{}, type);
    if (count == Powers::kSums) run(Powers{}, type);
  });
}

// in->a: what the clamp made; in->g: the gradient, which is written to; rest: of the same strides, or null.
void clamp_backward(const Pair* in, const void* rest, double low, double high, int32_t units, int32_t mean, void* out) {
  with_type(in->dtype, [&](auto type) {
    using T = decltype(type);
    const auto* y = static_cast<const T*>(in->a);
    const ClampBackward<T> task{static_cast<T*>(const_cast<void*>(in->g)), static_cast<const T*>(rest), low, high};
    const ChannelPlan plan = plan_channel_sums({y, task.g, sizeof(T), rest}, in->sizes, in->strides_a, in->strides_a,
                                               in->dims, 1, Places::of(units));
    Partials<Sum<T>> partials(parts_of(plan.geometry, Sums::kSums));
    launch_clamp_backward(plan, y, task, static_cast<Sum<T>*>(out), partials.values.data(), mean,
                          simt::Launch{kThreads});
    partials.check();
  });
}

// in->a: the gradient; in->g: where the result goes. Returns the number of passes over the gradient.
int32_t normalize_gradient(const Pair* in, int32_t units, double eps, void* norm) {
  bool held = false;
  with_type(in->dtype, [&](auto type) {
    using T = decltype(type);
    const auto* g = static_cast<const T*>(in->a);
    auto* unit = static_cast<T*>(const_cast<void*>(in->g));
    const NormalizePlan plan =
        plan_normalize_gradient(g, unit, sizeof(T), in->sizes, in->strides_a, in->strides_g, in->dims, units);
    held = plan.held;
    Partials<double> partials(held ? 0 : plan.samples * plan.split.splits);
    launch_normalize_gradient(plan, g, eps, unit, static_cast<Sum<T>*>(norm), partials.values.data(),
                              simt::Launch{kThreads});
    partials.check();
  });
  return held ? 1 : 2;
}

void random_gradient(const int64_t* ids, int64_t samples, int64_t id_stride, int64_t classes, int64_t seed,
                     uint32_t probe, int32_t normal, int32_t normalize, int32_t dtype, void* out) {
  with_type(dtype, [&](auto type) {
    launch_random_gradient(plan_random_gradient(samples, id_stride, classes), ids, seed, probe, normal, normalize,
                           static_cast<decltype(type)*>(out), simt::Launch{kThreads});
  });
}

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const auto words = fastscore::philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  std::copy(words.lane, words.lane + 4, out);
}

void random_words(const int64_t* ids, int64_t samples, int64_t blocks, int64_t seed, uint32_t probe, uint32_t* out) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      const fastscore::Words words = fastscore::random_words(ids[n], uint32_t(b), probe, seed);
      std::copy(words.lane, words.lane + 4, out + (n * blocks + b) * 4);
    }
  }
}

}  // extern "C"
