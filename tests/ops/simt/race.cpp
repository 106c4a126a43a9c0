// Every kernel that shares memory between threads, once or twice: an executable of its own for ThreadSanitizer.
#define SIMT_THREADS
#include "driver.cpp"

#include <cstdio>

namespace {

constexpr int kFloat = 0;

// channel_sums of float32 [samples, channels, positions], positions or channels innermost.
void sums(int64_t samples, int64_t channels, int64_t positions, bool channels_last, int units) {
  const int64_t sizes[] = {samples, channels, positions};
  const int64_t strides[] = {channels * positions, channels_last ? 1 : positions, channels_last ? channels : 1};
  const std::vector<float> a(samples * channels * positions, 0.5f), g(a);
  const Pair in{a.data(), g.data(), kFloat, 3, sizes, strides, strides};
  std::vector<float> out(3 * samples * channels);
  channel_sums(&in, 1, units, 3, true, out.data());
  std::printf("sums: %d splits, %g\n", int(plan_pair(&in, 1, units).geometry.split.splits), out[0]);
  std::vector<float> changed(g);
  const Pair clamp{a.data(), changed.data(), kFloat, 3, sizes, strides, strides};
  if (channels_last) return;
  clamp_backward(&clamp, g.data(), 0, 0.25, units, true, out.data());
  std::printf("clamp: %g, %g\n", out[0], changed[0]);
}

void normalize(int64_t samples, int64_t length) {
  const int64_t sizes[] = {samples, length}, strides[] = {length, 1};
  const std::vector<float> g(samples * length, 0.5f);
  std::vector<float> unit(g.size()), norm(samples);
  const Pair in{g.data(), unit.data(), kFloat, 2, sizes, strides, strides};
  const int passes = normalize_gradient(&in, 1, 0, norm.data());
  std::printf("normalize: %d passes, %g\n", passes, norm[0]);
}

void random(int64_t samples, int64_t classes) {
  const std::vector<int64_t> ids(samples, 7);
  std::vector<float> out(samples * classes);
  random_gradient(ids.data(), samples, 1, classes, 0, 0, true, true, kFloat, out.data());
  std::printf("random: %g\n", out[0]);
}

}  // namespace

int main() {
  sums(1, 2, 4096, false, 1);   // rows, a block to each
  sums(1, 2, 12300, false, 8);  // split
  sums(2, 24, 40, true, 1);     // columns
  normalize(2, 3000);           // one pass
  normalize(1, 9000);           // two
  random(2, 1200);
}
