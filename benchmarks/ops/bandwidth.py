"""`python -m benchmarks.ops.bandwidth`: bytes read per second by every way to Σ a·g, beside what the machine can read.

One row per dtype, layout and size; the ways take turns in every round, a figure is the median of the rounds, and a
ratio the median of each round's. With `--threads 1` the clock is the thread's own CPU time, which a busy machine
disturbs less.
"""

import argparse
import statistics
import time

import torch

from benchmarks.ops import kernels
from fastscore import ops
from fastscore.ops.library import simd_tier

COLUMNS = ("torch.dot", "dot", "sums", "powers", "eager", "einsum", "compiled", "compiled einsum")


def row(case: kernels.Case, repeats: int, threads: int) -> str:
    a, g = case.tensors()
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = kernels.interleaved(kernels.candidates(a, g), repeats, clock=clock)
    size = kernels.bytes_read(a, g)
    figures = "".join(f"{size / statistics.median(times[name]) / 1e9:>{max(7, len(name) + 2)}.1f}" for name in COLUMNS)
    dtype = str(case.dtype).removeprefix("torch.")
    return (f"{case.size:<8}{size / 1e6:>6.0f}  {dtype:<10}{case.layout:<15}{figures}"
            f"{kernels.times_as_fast(times['torch.dot'], times['dot']):>10.2f}"
            f"{kernels.times_as_fast(times['sums'], times['dot']):>10.2f}")


def small_calls(shape: tuple[int, ...], repeats: int, threads: int) -> str:
    """Microseconds per call where the call is most of what there is, and times as long as torch.dot's of as much."""
    a, g, ids = torch.randn(shape), torch.randn(shape), torch.arange(shape[0])
    x, y = (each.contiguous(memory_format=torch.channels_last) for each in (a, g))
    flat_a, flat_g = a.flatten(), g.flatten()
    functions = {"torch.dot": lambda: torch.dot(flat_a, flat_g), "channel_dot": lambda: ops.channel_dot(a, g),
                 "channels last": lambda: ops.channel_dot(x, y), "channel_sums": lambda: ops.channel_sums(a, g),
                 "channel_powers": lambda: ops.channel_powers(a, g),
                 "normalize_gradient": lambda: ops.normalize_gradient(a),
                 "random_gradient": lambda: ops.random_gradient(ids, 10, 0),
                 "eager": lambda: kernels.eager(a, g), "einsum": lambda: kernels.einsum(a, g)}
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = kernels.interleaved(functions, repeats, clock=clock)
    return "\n".join(f"  {name:<20}{statistics.median(seconds) * 1e6:>7.1f}"
                     f"{1 / kernels.times_as_fast(times['torch.dot'], seconds):>7.2f}"
                     for name, seconds in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds per row (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: PyTorch's)")
    parser.add_argument("--small", action="store_true", help="small calls alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"GB/s, torch {torch.__version__}, {arguments.threads} thread(s), SIMD tier {simd_tier()}, "
          f"last-level cache {kernels.last_level_cache() / 1e6:.0f} MB")
    if not arguments.small:
        heads = "".join(f"{name:>{max(7, len(name) + 2)}}" for name in COLUMNS)
        print(f"{'cache':<8}{'MB':>6}  {'dtype':<10}{'layout':<15}{heads}{'dot ratio':>11}{'sums/dot':>9}")
        for case in kernels.CASES:
            print(row(case, arguments.repeats, arguments.threads), flush=True)
        print("\ndot ratio: dot's bytes per second over torch.dot's; sums/dot: time of three sums over time of one")
    for shape in ((1, 16, 4, 4), (8, 64, 14, 14)):
        print(f"\n{'x'.join(map(str, shape))}, float32: µs a call, and times as long as torch.dot\n"
              f"{small_calls(shape, arguments.repeats, arguments.threads)}")


if __name__ == "__main__":
    main()
