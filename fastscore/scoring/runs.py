"""A run over batches: which of them are still to do here, and where what they give is added up.

A run may go on from a checkpoint, and share its batches with other processes. In neither case does a batch count twice
or not at all, and in neither does the order of additions depend on when the run was stopped.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed

from fastscore import files
from fastscore.batches import Batch, on_device
from fastscore.fingerprints import digest_of
from fastscore.modules.inspection import device_of
from fastscore.scoring.options import REDUCTION_SLOTS, Persistence
from fastscore.scoring.totals import Totals

_FORM = "fastscore-checkpoint-1"
_SHARE = 0.02  # of the time, at most, goes into saving


@runtime_checkable
class SliceableBatches(Protocol):
    """Batches of which some can be left out without being read.

    fingerprint(): equal for equal data, in the same batches.
    """

    def fingerprint(self) -> str: ...
    def first(self, samples: int) -> "SliceableBatches": ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice) -> "SliceableBatches": ...
    def __iter__(self) -> Iterator[Batch]: ...


class Batches:
    """The batches of a run on a device: the first of them, and what follows it, or any share of all.

    Raises ValueError where there is none.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, samples: int | None = None) -> None:
        self.sliceable: SliceableBatches | None = None
        if isinstance(batches, SliceableBatches):
            self.sliceable = batches if samples is None else batches.first(samples)
        self._device, self._samples = device, samples
        self.rest = on_device(batches if self.sliceable is None else self.sliceable[:1], device, samples)
        first = next(self.rest, None)
        if first is None:
            raise ValueError("batches: there is none to score on, or none that holds a sample")
        self.first: Batch = first

    def share(self, start: int, step: int) -> Iterator[Batch]:
        """Every step-th batch of sliceable ones, from number `start` on."""
        assert self.sliceable is not None
        return on_device(self.sliceable[start::step], self._device, self._samples)


@dataclass(frozen=True)
class _Progress:
    """Batches that are in the totals, a digest of what they held, and the totals' states, one for each slot."""

    done: int
    digest: str
    states: tuple[Mapping[str, Any], ...]


class Run:
    """Iterating gives (totals to add to, batch) for every batch to do here; a context manager that saves when stopped.

    totals: with nothing in them. identity: what makes a run the same one (see fastscore.fingerprints). data:
    the batches. persistence: where the run is kept, and the processes that all have the same batches and take turns at
    them.
    """

    def __init__(self, totals: Totals, identity: Mapping[str, Any], data: Batches, persistence: Persistence) -> None:
        self.rank, self.size = persistence.rank, persistence.size
        self.slots = [totals.new_empty() for _ in range(REDUCTION_SLOTS if persistence.fixed_order else 1)]
        self._totals, self._data = totals, data
        self._process_group, self._checkpoint = persistence.process_group, persistence.checkpoint
        contents = data.sliceable.fingerprint() if persistence.compared and data.sliceable is not None else None
        identity = {**identity, "data": contents, "fixed_order": persistence.fixed_order}
        if self._process_group is not None:
            _check_alike(identity, self._process_group)
        self._identity = {**identity, "process": [self.rank, self.size]}
        self._progress = _Progress(0, "", tuple(slot.state_dict() for slot in self.slots))
        self._saved, self._next_save = 0, 0.0
        if self._checkpoint is not None and not self._checkpoint.only_when_stopped:
            self._load()

    @property
    def samples(self) -> int:
        """Samples seen here."""
        return sum(slot.samples for slot in self.slots)

    def __iter__(self) -> Iterator[tuple[Totals, Batch]]:
        for number, batch in self._to_do():
            slot = number % len(self.slots)
            counts = self._checkpoint is not None
            content = digest_of(self._progress.digest, batch) if counts and self._data.sliceable is None else ""
            yield self.slots[slot], batch
            if counts:
                self._count(slot, content)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._checkpoint is not None and self._progress.done > self._saved \
                and (error is not None or not self._checkpoint.only_when_stopped):
            self._save()

    def totals(self) -> Totals:
        """What all processes have measured together."""
        if self._process_group is not None:
            for slot in self.slots:
                slot.all_reduce(device_of(self._totals.model), self._process_group)
        for slot in self.slots:
            self._totals.merge(slot)
        return self._totals

    def _to_do(self) -> Iterator[tuple[int, Batch]]:
        """(number among all batches, batch) of what is left of this process's share."""
        before = self._progress
        if self._data.sliceable is not None:
            numbers = range(len(self._data.sliceable))[self.rank::self.size][before.done:]
            if numbers and numbers[0] == 0:
                yield 0, self._data.first
                numbers = numbers[1:]
            if numbers:
                yield from zip(numbers, self._data.share(numbers.start, self.size), strict=True)
            return
        done, digest = 0, ""
        for number, batch in enumerate(itertools.chain([self._data.first], self._data.rest)):
            if number % self.size != self.rank:
                continue
            if done == before.done:
                yield number, batch
                continue
            done, digest = done + 1, digest_of(digest, batch)
            if done == before.done and digest != before.digest:
                raise ValueError(f"batches: the first {done} are not those in {self._path}, or not in that order; "
                                 "give the same again (shuffle=False, or a seeded sampler), or remove the file")
        if done < before.done:
            raise ValueError(f"batches: {self._path} has seen {before.done}, and there are {done}; give the "
                             "same again, or remove the file")

    def _count(self, slot: int, digest: str) -> None:
        """One more batch is in the slot's totals."""
        states = list(self._progress.states)
        states[slot] = _copy(self.slots[slot].state_dict())
        # as one object, so that an interrupt finds all of it or nothing
        self._progress = _Progress(self._progress.done + 1, digest, tuple(states))
        assert self._checkpoint is not None
        if not self._checkpoint.only_when_stopped and time.monotonic() >= self._next_save:
            self._save()

    @property
    def _path(self) -> Path:
        assert self._checkpoint is not None
        path = Path(self._checkpoint.path)
        return path if self.size == 1 else path.with_name(f"{path.name}.{self.rank}-of-{self.size}")

    def _save(self) -> None:
        progress, start = self._progress, time.monotonic()
        files.write_state(self._path, _FORM, {"identity": self._identity, "done": progress.done,
                                              "digest": progress.digest, "states": list(progress.states)})
        self._saved = progress.done
        self._next_save = time.monotonic() + (time.monotonic() - start) / _SHARE

    def _load(self) -> None:
        path = self._path
        others = sorted(other.name for other in path.parent.glob(f"{Path(self._checkpoint.path).name}*-of-*")
                        if not other.name.endswith((f"-of-{self.size}", ".part"))) if self._checkpoint else []
        if not path.exists():
            if others:
                raise ValueError(f"resume: {others[0]} was written by another number of processes than these "
                                 f"{self.size}; start as many again, or remove it")
            return
        state = files.read_state(path, _FORM, "checkpoint", "remove it to start over",
                                 device_of(self._totals.model))
        differing = [name for name, value in self._identity.items() if state["identity"].get(name) != value]
        if differing:
            raise ValueError(f"resume: {path} is of another run, with another {', another '.join(differing)}; "
                             "name another file, or remove it to start over")
        for slot, own in zip(self.slots, state["states"], strict=True):
            slot.load_state_dict(own)
        self._progress = _Progress(state["done"], state["digest"], tuple(_copy(own) for own in state["states"]))
        self._saved = self._progress.done


def _check_alike(identity: Mapping[str, Any], process_group: distributed.ProcessGroup) -> None:
    """Raise ValueError in every process where one of them was started otherwise."""
    found: list[Any] = [None] * process_group.size()
    distributed.all_gather_object(found, identity, group=process_group)
    for rank, other in enumerate(found):
        differing = [name for name in identity if other[name] != found[0][name]]
        if differing:
            raise ValueError(f"process_group: process {rank} has another {', another '.join(differing)} than process "
                             "0; give all of them the same")


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that what is added later does not change."""
    return {key: value.clone() if isinstance(value, Tensor) else _copy(value) if isinstance(value, Mapping) else value
            for key, value in state.items()}
