"""Calibration batches: read several times, with a part of the samples held out from every fit."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import distributed

from fastscore.batches.calls import Forward, call_model
from fastscore.batches.checks import check_batch
from fastscore.batches.devices import rank_and_size
from fastscore.batches.parts import Batch, can_be_cut, first_tensor, map_tensors
from fastscore.recovery.held_out import check_batches, take_rows

HELD_OUT = 4  # one of so many samples judges what the others fitted
Part = Literal["fit", "held out", "all"]


def share_of(batches: Iterable[Batch], device: torch.device, process_group: distributed.ProcessGroup | None = None,
             forward: Forward = call_model) -> Iterator[Batch]:
    """The batches that hold a sample and are this process's to read, on `device`."""
    rank, size = rank_and_size(process_group)
    for number, batch in enumerate(batches):
        if forward is call_model:
            check_batch(batch, "batches")
        if number % size == rank and _samples_in(batch) != 0:
            yield map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


class Calibration:
    """Batches in two parts, the same at every reading: one of HELD_OUT samples is held out, the others are to fit on.

    Samples are counted through all batches, so that the parts do not depend on the batch size; where `forward` is the
    user's own and what a sample is cannot be known, whole batches are counted instead. With process_group, every
    process counts alike and gets every size-th batch. Errors call the batches by `name`, the user's argument.

    Raises TypeError for what is not an iterable of batches, ValueError for one that can be read only once.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, forward: Forward = call_model,
                 process_group: distributed.ProcessGroup | None = None, name: str = "batches") -> None:
        check_batches(batches, name)
        self._batches, self._device, self._name = batches, device, name
        self._rank, self._processes = rank_and_size(process_group)
        self._by_sample = forward is call_model
        self._first: str | None = None
        self.size = 1  # samples in the first batch, once `first` was called
        self.samples = 0  # in all batches, once they were read
        self.held_out = 0  # of what is counted, samples or batches, so many are held out, once they were read

    def first(self) -> Batch:
        """The first batch that holds a sample, on the device: two samples of it where samples are counted. The same for
        every process. Raises ValueError where there is none."""
        for batch in self._checked():
            count = _samples_in(batch)
            if count != 0:
                self.size = count or 1
                if self._by_sample and count is not None:
                    batch = take_rows(batch, torch.arange(min(count, 2)))
                return map_tensors(lambda tensor: tensor.to(self._device), batch)
        raise ValueError(f"{self._name}: there is no batch, or none that holds a sample")

    def part(self, part: Part) -> Iterator[Batch]:
        """The batches of one part. Raises ValueError where they are not those of the reading before, or there is none.
        """
        for _, batch in self.numbered(part):
            yield batch

    def some(self, start: int, stop: int | None = None) -> Iterator[Batch]:
        """Of what is held out, samples or whole batches, that from `start` to `stop`."""
        for _, batch in self.numbered("held out", range(start, self.held_out if stop is None else stop)):
            yield batch

    @property
    def counted_in(self) -> int:
        """How many samples one is of what is counted."""
        return 1 if self._by_sample else self.size

    def numbered(self, part: Part, only: range | None = None) -> Iterator[tuple[int, Batch]]:
        """As `part`, each batch with its number among all. only: which of those held out."""
        seen = given = 0
        for number, batch in enumerate(self._checked()):
            count = _samples_in(batch)
            if count == 0:
                continue
            if not seen:
                self._check_order(batch)
            mine = number % self._processes == self._rank
            if not self._by_sample or count is None:
                chosen = part == "all" or (number % HELD_OUT == 1) == (part == "held out")
                chosen = chosen and (only is None or number // HELD_OUT in only)
                seen += 1
            else:
                place = torch.arange(seen, seen + count)
                held = place % HELD_OUT == 1
                wanted = held if part == "held out" else ~held
                if only is not None:
                    wanted &= (place // HELD_OUT >= only.start) & (place // HELD_OUT < only.stop)
                seen += count
                chosen = part == "all" or bool(wanted.any())
                if part != "all" and chosen and mine:
                    batch = take_rows(batch, wanted.nonzero()[:, 0])
            given += chosen
            if chosen and mine:
                yield number, map_tensors(lambda tensor: tensor.to(self._device, non_blocking=True), batch)
        self.samples = seen if self._by_sample else seen * self.size
        self.held_out = (seen + HELD_OUT - 2) // HELD_OUT
        if not given:
            what = "sample" if self._by_sample else "batch"
            raise ValueError(f"{self._name}: there is no batch, or none that holds a sample" if not seen else
                             f"{self._name}: {seen} {what}, and one of {HELD_OUT} is held out to judge by: give more")

    def _checked(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self._by_sample:
                check_batch(batch, self._name)
            yield batch

    def _check_order(self, batch: Batch) -> None:
        tensor = first_tensor(batch)
        digest = "" if tensor is None else hashlib.sha256(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        if self._first not in (None, digest):
            raise ValueError(f"{self._name}: its first batch is another at each reading, and some samples are held "
                             "out: give batches in a fixed order, without random augmentation (shuffle=False)")
        self._first = digest


def _samples_in(batch: Batch) -> int | None:
    """How many samples a batch holds, by its first tensor; None where that does not tell."""
    tensor = first_tensor(batch)
    return len(tensor) if tensor is not None and tensor.dim() and (can_be_cut(batch) or not len(tensor)) else None
