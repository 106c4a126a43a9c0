"""Passes recorded once, and replayed: a CUDA graph starts all kernels of a pass with one call.

A graph's kernels read and write the memory that they were recorded with. So the batch of a recorded pass is copied into
the one that it was recorded with, and what a pass gives is copied out before the next one starts.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastscore.batches.parts import Batch, map_tensors, tensors_of
from fastscore.wording import counted

T = TypeVar("T")
_MOST = 4  # graphs, each of which keeps the memory of a pass


class Recorder(Protocol):
    """What records the work of a device: torch's CUDA graphs, or what stands for them in a test."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """(what `work` returns, a function that does the same again, into the same memory); nothing has run yet."""


def cuda_recorder(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """The Recorder of a CUDA device."""
    graph = torch.cuda.CUDAGraph()
    # other threads (a DataLoader's, which pins memory) may do as they like meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_recorder}
"""Type of device -> what records its work."""


@dataclass
class _Recorded(Generic[T]):
    batch: Batch
    result: T
    replay: Callable[[], None]


class Graphs(Generic[T]):
    """Runs work on batches: as it is, or recorded, where two batches in a row are alike but for their values.

    reason: why nothing is recorded, if nothing is; a recording that fails becomes one. required: RuntimeError then.
    """

    def __init__(self, device: torch.device, reason: str = "", required: bool = False) -> None:
        self._recorder = RECORDERS.get(device.type)
        self.reason = reason or ("" if self._recorder else f"nothing records the work of {device.type}")
        self._required = required
        self._previous: Hashable = None
        self._recorded: dict[Hashable, _Recorded[T]] = {}
        if self.reason and required:
            raise RuntimeError(f"graph: True, but {self.reason}; use graph=\"auto\"")

    @property
    def outcome(self) -> str:
        """What came of it, for a plan; empty where there are no graphs."""
        if self._recorder is None:
            return ""
        recorded = counted(len(self._recorded), "CUDA graph")
        return recorded if self._recorded else f"no CUDA graph: {self.reason or 'no two batches in a row of one shape'}"

    def run(self, work: Callable[[Batch], T], batch: Batch, copied: Callable[[T], T], state: Hashable = None
            ) -> tuple[T, bool]:
        """(work(batch), which must not look at what the device computes, whether a graph did it)

        copied: its result in memory of its own. state: what else of the host the work depends on.
        """
        if self.reason or self._recorder is None:
            return work(batch), False
        alike, self._previous = self._previous, _signature(batch)
        key = (self._previous, state)
        recorded = self._recorded.get(key)
        if recorded is None:
            if self._previous is None or alike != self._previous or len(self._recorded) == _MOST:
                return work(batch), False
            recorded = self._record(work, batch, key)
            if recorded is None:
                return work(batch), False
        for own, new in zip(tensors_of(recorded.batch), tensors_of(batch), strict=True):
            own.copy_(new, non_blocking=True)
        recorded.replay()
        return copied(recorded.result), True

    def _record(self, work: Callable[[Batch], T], batch: Batch, key: Hashable) -> "_Recorded[T] | None":
        assert self._recorder is not None
        own = map_tensors(torch.clone, batch)
        try:
            result, replay = self._recorder(lambda: work(own))
        except (RuntimeError, ValueError, TypeError) as error:  # the same work has run on a batch like this one
            self.reason = f"recording failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            self._recorded.clear()
            if self._required:
                raise RuntimeError(f"graph: True, but {self.reason}; use graph=\"auto\"") from error
            return None
        self._recorded[key] = _Recorded(own, result, replay)
        return self._recorded[key]


def _signature(batch: Batch) -> Hashable:
    """Equal for batches that differ in the values of their tensors alone; None where that cannot be told."""
    if isinstance(batch, Tensor):
        return type(batch), batch.shape, batch.stride(), batch.dtype, batch.device
    if isinstance(batch, Mapping):
        parts: list[Any] = [(key, _signature(value)) for key, value in batch.items()]
        return None if any(part is None for _, part in parts) else (type(batch), *parts)
    if isinstance(batch, (tuple, list)):
        parts = [_signature(value) for value in batch]
        return None if any(part is None for part in parts) else (type(batch), *parts)
    return (type(batch), batch) if isinstance(batch, (str, int, float, bool, type(None))) else None
