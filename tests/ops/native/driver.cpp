// Every kernel of every tier on the threads of a pool of its own, without PyTorch: for sanitizers. The operands end
// where their memory ends, so that a read beyond them is one beyond the heap block.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"

using namespace fastscore::cpu;

constexpr int kThreads = 4;

void in_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int64_t i; (i = next++) < count;) f(i, i + 1);
    });
  }
  for (auto& thread : threads) thread.join();
}

void require(bool ok, const char* what, const char* tier, int dtype) {
  if (ok) return;
  std::printf("wrong: %s, tier %s, dtype %d\n", what, tier, dtype);
  std::exit(1);
}

constexpr int kBytes[] = {4, 8, 2, 2};

// Ones, in memory of exactly `count` elements.
std::unique_ptr<char[]> ones(int64_t count, int dtype) {
  std::unique_ptr<char[]> memory(new char[count * kBytes[dtype]]);
  for (int64_t i = 0; i < count; ++i) {
    const float single = 1;
    const double wide = 1;
    const uint16_t brain = 0x3f80, half = 0x3c00;
    const void* value[] = {&single, &wide, &brain, &half};
    memcpy(memory.get() + i * kBytes[dtype], value[dtype], kBytes[dtype]);
  }
  return memory;
}

double read(const void* memory, int64_t i, bool wide) {
  return wide ? static_cast<const double*>(memory)[i] : static_cast<const float*>(memory)[i];
}

struct Layout {
  const char* name;
  int64_t samples, channels, positions;
  int64_t sample, channel, position;  // strides of a
  int64_t g_sample, g_channel, g_position;
};

// The last element of each operand is the last of its memory.
int64_t extent(const Layout& l, bool g) {
  return (l.samples - 1) * (g ? l.g_sample : l.sample) + (l.channels - 1) * (g ? l.g_channel : l.channel) +
         (l.positions - 1) * (g ? l.g_position : l.position) + 1;
}

// Runs a reduction that takes `count` sums of ones.
void reduce(Reduction& reduction, int count, const char* name, const char* tier, int dtype,
            const std::function<void(int64_t, int64_t)>& kernel) {
  const bool wide = dtype == int(Dtype::float64);
  const int64_t rows = reduction.sample.size * reduction.channel.size, width = wide ? 8 : 4;
  std::vector<std::unique_ptr<char[]>> out;
  for (int k = 0; k < count; ++k) {
    out.emplace_back(new char[rows * width]);
    reduction.sums[k] = out[k].get();
  }
  std::unique_ptr<char[]> partials(new char[rows * reduction.chunks * count * width]);
  reduction.partials = partials.get();
  in_parallel(reduction.items(), kernel);
  for (int k = 0; k < count; ++k) {
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      const int64_t n = row / reduction.channel.size, c = row % reduction.channel.size;
      for (int64_t chunk = 0; chunk < reduction.chunks; ++chunk) {
        sum += reduction.chunks == 1 ? read(reduction.sums[k], row, wide)
                                : read(reduction.partials, ((n * reduction.chunks + chunk) * count + k) * reduction.channel.size + c,
                                       wide);
      }
      require(sum == double(reduction.positions.count()), name, tier, dtype);
    }
  }
}

void sums(const Kernels& kernels, const Layout& l, int dtype) {
  const auto a = ones(extent(l, false), dtype), g = ones(extent(l, true), dtype);
  for (int op = 0; op < 3; ++op) {
    const int count = op == kDot ? 1 : op == kSums ? 3 : 2;
    Reduction reduction{};
    reduction.a = a.get();
    reduction.g = g.get();
    reduction.sample = {l.samples, l.sample, l.g_sample};
    reduction.channel = {l.channels, l.channel, l.g_channel};
    reduction.positions.add({l.positions, l.position, l.g_position});
    choose_path(reduction);
    reduce(reduction, count, l.name, kernels.tier, dtype,
           [&](int64_t begin, int64_t end) { kernels.channel_sums[dtype][op](reduction, begin, end); });
  }
}

double element(const void* memory, int64_t i, int dtype) {
  switch (Dtype(dtype)) {
    case Dtype::float32: return static_cast<const float*>(memory)[i];
    case Dtype::float64: return static_cast<const double*>(memory)[i];
    case Dtype::bfloat16: return to_double(static_cast<const bf16*>(memory)[i]);
    default: return to_double(static_cast<const fp16*>(memory)[i]);
  }
}

// Of ones between 0 and `high`, with and without the gradients of other readers.
void clamp(const Kernels& kernels, const Layout& l, int dtype, bool more, double high) {
  const int64_t count = extent(l, false);
  const auto y = ones(count, dtype), g = ones(count, dtype), rest = ones(count, dtype);
  ClampBackward task{{}, more ? rest.get() : nullptr, g.get(), 0, high};
  Reduction& reduction = task.reduction;
  reduction.a = y.get();
  reduction.g = g.get();
  reduction.sample = {l.samples, l.sample, l.sample};
  reduction.channel = {l.channels, l.channel, l.channel};
  reduction.positions.add({l.positions, l.position, l.position});
  choose_path(reduction);
  if (reduction.path == Path::squares) reduction.path = Path::columns;
  reduce(reduction, 3, l.name, kernels.tier, dtype,
         [&](int64_t begin, int64_t end) { kernels.clamp_backward[dtype](task, begin, end); });
  for (int64_t i = 0; i < count; ++i) {
    require(element(g.get(), i, dtype) == (high > 1 ? 1 + more : 0), "clamp", kernels.tier, dtype);
  }
}

void normalize(const Kernels& kernels, int64_t samples, int64_t length, int64_t stride, int dtype) {
  const auto in = ones((samples * length - 1) * stride + 1, dtype);
  std::unique_ptr<char[]> out(new char[samples * length * kBytes[dtype]]), norm(new char[samples * 8]);
  NormalizeGradient task{};
  task.sample = {samples, length * stride, length};
  task.elements.add({length, stride, 1});
  task.elements.collapse();
  task.in = in.get();
  task.out = out.get();
  task.norm = norm.get();
  in_parallel(samples, [&](int64_t begin, int64_t end) { kernels.normalize_gradient[dtype](task, begin, end); });
  const bool wide = dtype == int(Dtype::float64);
  for (int64_t n = 0; n < samples; ++n) {
    require(std::abs(read(norm.get(), n, wide) - std::sqrt(double(length))) < 1e-4, "norm", kernels.tier, dtype);
  }
}

void random(const Kernels& kernels, int64_t classes) {
  std::unique_ptr<int64_t[]> ids(new int64_t[9]);
  for (int i = 0; i < 9; ++i) ids[i] = i * 7919 - 3;
  for (const bool normal : {false, true}) {
    std::unique_ptr<float[]> out(new float[9 * classes]);
    const RandomGradient task{ids.get(), 1, classes, INT64_MIN, UINT32_MAX, normal, true, out.get()};
    in_parallel(9, [&](int64_t begin, int64_t end) { kernels.random_gradient(task, begin, end); });
    for (int64_t n = 0; n < 9; ++n) {
      double squares = 0;
      for (int64_t k = 0; k < classes; ++k) squares += double(out[n * classes + k]) * out[n * classes + k];
      require(std::abs(squares - 1) < 1e-5, "random gradient", kernels.tier, normal);
    }
  }
}

// Kernels of ones on ones: each output is the number of weights that lie on an image, times the channels.
void winograd(const Kernels& kernels, int64_t channels, int64_t outputs, int64_t height, int64_t width,
              int64_t padding) {
  Winograd task{};
  task.height = height;
  task.width = width;
  task.channels = channels;
  task.padding_y = task.padding_x = padding;
  task.out_height = height + 2 * padding - 2;
  task.out_width = width + 2 * padding - 2;
  task.outputs = outputs;
  task.block = 5;
  task.low = -1;
  task.high = float(9 * channels);  // bias goes beyond it
  constexpr int64_t kSamples = 3;
  const auto in = ones(kSamples * height * width * channels, 0), bias = ones(outputs, 0);
  std::unique_ptr<float[]> weight(new float[36 * task.panels() * channels * kPanel]),
      out(new float[kSamples * task.out_height * task.out_width * outputs]);
  double ones_at[6] = {};  // G times three ones
  const double points[] = {0, 2. / 3, -2. / 3, 1.5, -1.5};
  for (int i = 0; i < 5; ++i) {
    double others = 1;
    for (int j = 0; j < 5; ++j) others *= i == j ? 1 : points[i] - points[j];
    ones_at[i] = (1 + points[i] + points[i] * points[i]) / others;
  }
  ones_at[5] = 1;
  const int64_t of_product = task.panels() * channels * kPanel;
  for (int64_t i = 0; i < 36 * of_product; ++i) {
    weight[i] = float(ones_at[i / of_product / 6] * ones_at[i / of_product % 6]);
  }
  task.in = reinterpret_cast<const float*>(in.get());
  task.weight = weight.get();
  task.bias = reinterpret_cast<const float*>(bias.get());
  task.out = out.get();
  in_parallel(kSamples, [&](int64_t begin, int64_t end) {
    const int64_t tiles = task.tiles_y() * task.tiles_x();
    std::unique_ptr<float[]> scratch(new float[task.scratch()]);
    kernels.winograd(task, begin * tiles, end * tiles, scratch.get());
  });
  const auto covered = [padding](int64_t at, int64_t size) {
    int64_t count = 0;
    for (int64_t tap = 0; tap < 3; ++tap) count += at + tap >= padding && at + tap < size + padding;
    return count;
  };
  for (int64_t i = 0; i < kSamples * task.out_height * task.out_width * outputs; ++i) {
    const int64_t x = i / outputs % task.out_width, y = i / outputs / task.out_width % task.out_height;
    const double sum = double(covered(y, height) * covered(x, width) * channels) + 1;
    const double clamped = sum < task.high ? sum : task.high;
    require(std::abs(out[i] - clamped) < 1e-4 * double(task.high), "winograd", kernels.tier, 0);
  }
}

int main() {
#ifdef ONLY_TIER
  std::vector<const Kernels*> tiers{&ONLY_TIER::kernels};
#else
  std::vector<const Kernels*> tiers{&baseline::kernels};
#ifdef __x86_64__
  if (has_v3()) tiers.push_back(&v3::kernels);
  if (has_v4()) tiers.push_back(&v4::kernels);
#endif
#endif
  std::vector<Layout> layouts;
  for (const int64_t c : {1, 3, 17, 70}) {
    for (const int64_t p : {1, 5, 49, 513, 4097}) {
      layouts.push_back({"rows", 3, c, p, c * p, p, 1, c * p, p, 1});
      layouts.push_back({"columns", 3, c, p, c * p, 1, c, c * p, 1, c});
      layouts.push_back({"mixed", 3, c, p, c * p, p, 1, c * p, 1, c});
      layouts.push_back({"strided", 3, c, p, 2 * c * p, 2 * p, 2, c * p, p, 1});
      layouts.push_back({"repeated", 3, c, p, c * p, p, 1, c, 1, 0});
      layouts.push_back({"repeated columns", 3, c, p, c * p, 1, c, c, 1, 0});
      layouts.push_back({"one value", 3, c, p, c * p, 1, c, 0, 0, 0});
      layouts.push_back({"cropped", 3, c, p, (c + 1) * (p + 2), p + 2, 1, (c + 3) * p, 1, c + 3});
    }
  }
  layouts.push_back({"wide", 2, 1030, 3, 3090, 1, 1030, 3090, 1, 1030});
  for (const Kernels* kernels : tiers) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (const Layout& layout : layouts) {
        sums(*kernels, layout, dtype);
        if (!strcmp(layout.name, "rows") || !strcmp(layout.name, "columns") || !strcmp(layout.name, "wide")) {
          for (const double high : {1., 2.}) {
            for (const bool more : {false, true}) clamp(*kernels, layout, dtype, more, high);
          }
        }
      }
      for (const int64_t length : {1, 3, 8, 1001}) {
        normalize(*kernels, 5, length, 1, dtype);
        normalize(*kernels, 5, length, 3, dtype);
      }
    }
    for (const int64_t classes : {1, 3, 127, 128, 129, 1000}) random(*kernels, classes);
    for (const int64_t padding : {0, 1, 2}) {
      for (const int64_t size : {3, 6, 13}) winograd(*kernels, 19, 37, size, size + 1, padding);
    }
    std::printf("%s: %zu layouts\n", kernels->tier, layouts.size());
  }
}
