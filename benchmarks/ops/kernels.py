"""What the op benchmarks share: inputs beyond and inside the last-level cache, and the ways to compute Σ a·g."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastscore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (256, 56, 56)  # C, H, W: the widest activations of ResNet-50


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) * 1024 for size in sizes), default=32 * 2**20)


class Case(NamedTuple):
    """One pair of inputs: `size` is "beyond" or "inside" the last-level cache."""

    size: str
    dtype: torch.dtype
    layout: str

    @property
    def name(self) -> str:
        return f"{self.size}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(a, g), [N, C, H, W] each."""
        c, h, w = SHAPE
        wanted = last_level_cache() * 1.25 if self.size == "beyond" else min(16 * 2**20, last_level_cache() / 2)
        samples = max(1, round(wanted / (2 * c * h * w * self.dtype.itemsize)))
        a, g = (torch.randn(samples, c, h, w).to(self.dtype).to(memory_format=LAYOUTS[self.layout]) for _ in range(2))
        return a, g


CASES = [Case(size, dtype, layout) for size in ("beyond", "inside") for dtype in DTYPES for layout in LAYOUTS]


def bytes_read(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def eager(a: Tensor, g: Tensor) -> Tensor:
    return (a * g).sum((2, 3), dtype=torch.float32)


def einsum(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("nchw,nchw->nc", a, g)


def candidates(a: Tensor, g: Tensor) -> dict[str, Callable[[], object]]:
    """Every way to the per-channel dot product, and `torch.dot` over as many bytes: the machine's two-stream read."""
    torch._dynamo.reset()
    compiled, compiled_einsum = torch.compile(eager), torch.compile(einsum)
    x, y = (torch.randn(t.nbytes // 4) for t in (a, g))
    return {
        "torch.dot": functools.partial(torch.dot, x, y),
        "dot": functools.partial(ops.channel_dot, a, g),
        "sums": functools.partial(ops.channel_sums, a, g),
        "powers": functools.partial(ops.channel_powers, a, g),
        "eager": functools.partial(eager, a, g),
        "einsum": functools.partial(einsum, a, g),
        "compiled": functools.partial(compiled, a, g),
        "compiled einsum": functools.partial(compiled_einsum, a, g),
    }


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.02,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds per call of each round: in each of `repeats` rounds every function runs for about `seconds`, in turn."""
    calls = {}
    for name, function in functions.items():
        function()  # compiles, allocates
        start = clock()
        function()
        calls[name] = max(1, round(seconds / max(clock() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            for _ in range(calls[name]):
                function()
            times[name].append((clock() - start) / calls[name])
    return times


def times_as_fast(slow: list[float], fast: list[float]) -> float:
    """How many times as fast `fast` is: the median of the ratios of each round, which share what else went on."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))
