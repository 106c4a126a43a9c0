"""`python -m benchmarks.ops.layouts`: shapes and layouts off the usual path, beside what eager PyTorch does with them.

One row per shape, layout and dtype, each with bytes per second of the two tensors that are read and, as medians of
each round's ratio: how `channel_dot` compares with `torch.dot` over as many bytes, and `channel_dot`, `channel_sums`
and `normalize_gradient` with eager. Above 1 we are faster. One thread, timed by its own CPU time.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ops import kernels
from fastscore import ops
from fastscore.ops.library import simd_tier


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = lambda x: x
    channel_dim: int = 1

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return self.view(torch.randn(self.shape).to(dtype))


CASES = (
    Case("one channel, channels last", (16, 1, 128, 128), channels_last),
    Case("two channels, channels last", (16, 2, 112, 112), channels_last),
    Case("images, channels last", (16, 3, 224, 224), channels_last),
    Case("images", (16, 3, 224, 224)),
    Case("5 channels, channels last", (16, 5, 96, 96), channels_last),
    Case("12 channels, channels last", (16, 12, 56, 56), channels_last),
    Case("100 channels, channels last", (16, 100, 28, 28), channels_last),
    Case("7x7", (32, 512, 7, 7)),
    Case("7x7, channels last", (32, 512, 7, 7), channels_last),
    Case("cropped", (16, 64, 58, 58), lambda x: x[:, :, 1:-1, 1:-1]),
    Case("cropped, channels last", (16, 64, 58, 58), lambda x: channels_last(x)[:, :, 1:-1, 1:-1]),
    Case("height and width swapped", (16, 64, 56, 56), lambda x: x.transpose(2, 3)),
    Case("every second position", (16, 64, 56, 56), lambda x: x[:, :, ::2, ::2]),
    Case("every second position, channels last", (16, 64, 56, 56), lambda x: channels_last(x)[:, :, ::2, ::2]),
    Case("every second channel", (16, 128, 56, 56), lambda x: x[:, ::2]),
    Case("every second channel, channels last", (16, 128, 56, 56), lambda x: channels_last(x)[:, ::2]),
    Case("half the channels, channels last", (16, 128, 56, 56), lambda x: channels_last(x)[:, :64]),
    Case("tokens", (16, 197, 768), channel_dim=2),
    Case("tokens, sequence first", (197, 16, 768), lambda x: x.transpose(0, 1), 2),
    Case("heads", (16, 12, 197, 64), channel_dim=3),
    Case("video", (4, 32, 16, 28, 28)),
    Case("video, channels last", (4, 32, 16, 28, 28), channels_last),
    Case("sound", (32, 64, 1000)),
    Case("features", (256, 1024)),
)


def row(case: Case, dtype: torch.dtype, repeats: int) -> str:
    a, g = case.tensor(dtype), case.tensor(dtype)
    size = 2 * a.numel() * a.element_size()
    x, y = torch.randn(size // 8), torch.randn(size // 8)
    positions = [d for d in range(1, a.dim()) if d != case.channel_dim]

    def total(x: Tensor) -> Tensor:
        return x.sum(positions, dtype=torch.float32) if positions else x.float()

    times = kernels.interleaved({
        "torch.dot": functools.partial(torch.dot, x, y),
        "dot": functools.partial(ops.channel_dot, a, g, case.channel_dim),
        "eager dot": lambda: total(a * g),
        "sums": functools.partial(ops.channel_sums, a, g, case.channel_dim),
        "eager sums": lambda: (total(a * g), total(a), total(g)),
        "normalize": functools.partial(ops.normalize_gradient, g),
        "eager normalize": lambda: torch.nn.functional.normalize(g.flatten(1)),
    }, repeats, clock=time.thread_time)
    ratios = (kernels.times_as_fast(times[slow], times[fast]) for slow, fast in (
        ("torch.dot", "dot"), ("eager dot", "dot"), ("eager sums", "sums"), ("eager normalize", "normalize")))
    return (f"{case.name:<38}{str(dtype).removeprefix('torch.'):<10}{size / 1e6:>5.1f}"
            f"{size / statistics.median(times['dot']) / 1e9:>7.1f}" + "".join(f"{ratio:>11.2f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds per row (default: 9)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, SIMD tier {simd_tier()}, "
          f"last-level cache {kernels.last_level_cache() / 1e6:.0f} MB\ntimes as fast as: torch.dot (dot), "
          "eager (dot, sums, normalize)")
    print(f"{'':<38}{'dtype':<10}{'MB':>5}{'GB/s':>7}{'torch.dot':>11}{'dot':>11}{'sums':>11}{'normalize':>11}")
    for case in CASES:
        for dtype in arguments.dtypes:
            print(row(case, getattr(torch, dtype), arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
