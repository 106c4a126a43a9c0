"""Contestants in turn: seconds, their ratios within each round, and the peak of live tensor bytes."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Stopwatch:
    """`with stopwatch:` around what counts; `seconds` of the latest such block, with the device's work done."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class PeakBytes(Stopwatch):
    """Used as a Stopwatch is; `bytes`: the most bytes of tensors that live at once in the latest block, above those
    that live before it.

    On a CPU from PyTorch's record of what its allocator gives and takes back, kernels' own work space and weights laid
    out for oneDNN included, so that it does not depend on malloc; on a GPU from the caching allocator's counter.
    """

    bytes = 0

    def __enter__(self) -> "PeakBytes":
        self._wait()
        gc.collect()  # what others left must not go, and be taken off, while this runs
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._record.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._wait()
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._record.__exit__(kind, error, trace)
        now = self.bytes = 0
        for event in sorted(self._record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
                now += event.nbytes()
                self.bytes = max(self.bytes, now)
        del self._record


@dataclass(frozen=True)
class Row:
    """One contestant on one model. times_as_fast: the baseline's seconds over its own, in each round: their median,
    least and most. A contestant that could not run has no figures, and a note that says why."""

    part: str
    model: str
    contestant: str
    images: int
    size: int
    seconds: float | None = None
    peak_mib: float | None = None
    times_as_fast: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def per_100_images(self) -> float | None:
        """Seconds for 100 images."""
        return None if self.seconds is None else 100 * self.seconds / self.images


class CannotRun(Exception):
    """Why a contestant sits a model out."""


Starter: TypeAlias = Callable[[], Callable[[Stopwatch], Any]]


def compare(contestants: Mapping[str, Starter], baseline: str, repeats: int, device: str,
            note: Callable[[Any], str] = lambda result: "") -> dict[str, dict[str, Any]]:
    """The figures of a Row for each contestant, which take turns in each of `repeats` rounds, another first in each.

    contestants: name -> what prepares it and returns its run. note: of what a run returns. Memory is that of the first
    run, which also warms up. Whatever a contestant raises then stands in its note.
    """
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[Stopwatch], Any]] = {}
    for name, prepare in contestants.items():
        try:
            run = prepare()
            with PeakBytes(device) as peak:
                result = run(Stopwatch(device))
        except Exception as error:
            reason = str(error) if isinstance(error, CannotRun) else f"{type(error).__name__}: {error}"
            found[name] = {"note": reason.strip().split("\n")[0]}
        else:
            runs[name], found[name] = run, {"peak_mib": peak.bytes / 2**20, "note": note(result)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(repeats):
        for name in order:
            clock = Stopwatch(device)
            runs[name](clock)
            seconds[name].append(clock.seconds)
        order = order[1:] + order[:1]
    for name, taken in seconds.items():
        found[name]["seconds"] = statistics.median(taken)
        if baseline in seconds:
            ratios = [base / own for base, own in zip(seconds[baseline], taken, strict=True)]
            found[name] |= {"times_as_fast": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found

