"""A run over batches: which of them are still to do here, and where what they give is added up.

A run may go on from a file, and share its batches with other processes. In neither case does a batch count twice
or not at all, and in neither does the order of additions depend on when the run was stopped.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed

from fastscore import files
from fastscore.batches.devices import on_device
from fastscore.batches.parts import Batch
from fastscore.fingerprints import digest_of
from fastscore.modules.inspection import device_of
from fastscore.scoring.options import REDUCTION_SLOTS, Persistence
from fastscore.scoring.run_file import RunFile, remaining
from fastscore.scoring.totals import Totals
from fastscore.wording import counted

FORM, _WHAT = "fastscore-checkpoint-1", "file of score(resume=)"


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
        self._process_group, checkpoint = persistence.process_group, persistence.checkpoint
        contents = data.sliceable.fingerprint() if persistence.compared and data.sliceable is not None else None
        identity = {**identity, "data": contents, "fixed_order": persistence.fixed_order}
        if self._process_group is not None:
            _check_alike(identity, self._process_group)
        self._progress = _Progress(0, "", tuple(slot.state_dict() for slot in self.slots))
        self.number = 0  # of the batch that was read last, among all
        self._saved, self._only_when_stopped = 0, checkpoint is not None and checkpoint.only_when_stopped
        self._file = None if checkpoint is None else RunFile(
            checkpoint.path, FORM, _WHAT, {**identity, "process": [self.rank, self.size]},
            self.rank, self.size, device_of(totals.model))
        if self._file is not None and not self._only_when_stopped:
            self._load(self._file)
        if self._progress.done and checkpoint is not None and checkpoint.tell is not None:
            done = f"{counted(self._progress.done, 'batch', 'batches')} ({counted(self.samples, 'sample')})"
            checkpoint.tell(f"resume: goes on from {checkpoint.path}, after {done} that are scored; no option is "
                            "ignored: other ones than then would be refused")

    @property
    def samples(self) -> int:
        """Samples seen here."""
        return sum(slot.samples for slot in self.slots)

    def __iter__(self) -> Iterator[tuple[Totals, Batch]]:
        for number, batch in self._to_do():
            slot, self.number = number % len(self.slots), number
            counts = self._file is not None
            content = digest_of(self._progress.digest, batch) if counts and self._data.sliceable is None else ""
            yield self.slots[slot], batch
            if counts:
                self._count(slot, content)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._file is not None and self._progress.done > self._saved \
                and (error is not None or not self._only_when_stopped):
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
        own = itertools.islice(itertools.chain([self._data.first], self._data.rest), self.rank, None, self.size)
        left = own if self._file is None else remaining(own, before.done, before.digest, self._file.path)
        yield from zip(itertools.count(self.rank + before.done * self.size, self.size), left, strict=False)

    def _count(self, slot: int, digest: str) -> None:
        """One more batch is in the slot's totals."""
        states = list(self._progress.states)
        states[slot] = _copy(self.slots[slot].state_dict())
        # as one object, so that an interrupt finds all of it or nothing
        self._progress = _Progress(self._progress.done + 1, digest, tuple(states))
        assert self._file is not None
        if not self._only_when_stopped and self._file.due:
            self._save()

    def _save(self) -> None:
        progress = self._progress
        assert self._file is not None
        self._file.save({"done": progress.done, "digest": progress.digest, "states": list(progress.states)})
        self._saved = progress.done

    def _load(self, file: RunFile) -> None:
        state = file.load()
        if state is None:
            return
        for slot, own in zip(self.slots, state["states"], strict=True):
            slot.load_state_dict(own)
        self._progress = _Progress(state["done"], state["digest"], tuple(_copy(own) for own in state["states"]))
        self._saved = self._progress.done


def run_notes(path: str | PathLike[str]) -> dict[str, str]:
    """What the file of a run says of it: how far it is, and the options that it was started with.

    Raises ValueError for a file that is none, or damaged.
    """
    state = files.read_state(path, FORM, _WHAT, "start the run again")
    identity = dict(state["identity"])
    rank, size = identity.pop("process")
    samples = sum(each["counts"]["samples"] for each in state["states"])
    return {"run": "of score, kept by resume=: the same call, or command, goes on from it",
            "done": f"{counted(state['done'], 'batch', 'batches')}, {counted(samples, 'sample')}",
            **({"process": f"{rank} of {size}"} if size > 1 else {}),
            **{name: str(value) for name, value in identity.items() if name not in ("model", "weights", "data")}}


def _check_alike(identity: Mapping[str, Any], process_group: distributed.ProcessGroup) -> None:
    """Raise ValueError in every process where one of them was started otherwise."""
    found: list[Any] = [None] * process_group.size()
    distributed.all_gather_object(found, identity, group=process_group)
    for rank, other in enumerate(found):
        differing = [name for name in identity if other[name] != found[0][name]]
        if differing:
            raise ValueError(f"process_group: process {rank} differs from process 0 in {', '.join(differing)}; "
                             "give all of them the same")


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that what is added later does not change."""
    return {key: value.clone() if isinstance(value, Tensor) else _copy(value) if isinstance(value, Mapping) else value
            for key, value in state.items()}
