"""Unlabelled batches to train on, epoch after epoch, with some of the samples held out to judge by."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fastscore.batches.checks import check_batch
from fastscore.batches.parts import Batch, map_tensors
from fastscore.fingerprints import digest_of
from fastscore.recovery.held_out import check_batches, held_out_rows, rows_in, samples_in, take_rows
from fastscore.wording import counted

HELD_OUT = 8  # one of so many samples judges and is never trained on
OF_FEW = (4, 2)  # of so many where none would: samples are told by content, so that chance may leave none of a few
ENOUGH = 16  # samples that differ: that none of them judges, or all do, is one chance in 65,536
JUDGES = 512  # as many of these are looked at, at most


@dataclass(frozen=True)
class Position:
    """How far reading has come: batches read of an epoch, and a digest of what they held.

    number: batches that could be trained on, in all epochs so far; before: in those before this one.
    """

    epoch: int = 0
    index: int = 0
    number: int = 0
    before: int = 0
    digest: str = ""


class TrainingBatches:
    """Batches to train on and to judge by.

    Which samples are held out is told by what they hold, so that neither order nor batch size matters: a loader may
    shuffle. One that changes images at random shows the same image as many, and needs `held_out` of its own.

    batches: read once in every epoch. held_out: batches to judge by, read at every look; None: one of HELD_OUT samples
    of `batches` (of OF_FEW, where that is none). seed: of torch's random numbers when an epoch begins, and so of the
    order of a loader that shuffles.
    rank, size: of processes that have the same batches, and take turns at them. first_only: what follows the first
    element of a tuple or list is dropped unread. digests: tell by content whether a run goes on with the same batches.

    Raises TypeError for what is no iterable of batches, ValueError for one that can be read only once.
    """

    def __init__(self, batches: Iterable[Batch], held_out: Iterable[Batch] | None, seed: int, *, rank: int = 0,
                 size: int = 1, first_only: bool = True, digests: bool = True) -> None:
        check_batches(batches, "batches")
        if held_out is not None:
            check_batches(held_out, "held_out")
        self._batches, self._held_out, self._seed = batches, held_out, seed
        self._rank, self._size, self._first_only, self._digests = rank, size, first_only, digests
        self._one_of = HELD_OUT

    @property
    def judges_name(self) -> str:
        """The argument that the batches to judge by are of."""
        return "batches" if self._held_out is None else "held_out"

    def judges(self) -> Iterable[Batch]:
        """The batches to judge by, of this process. Raises ValueError where there are too few samples to hold some
        out."""
        if self._held_out is not None:
            return _Share(self._held_out, self._rank, self._size, partial(self._without_labels, name=self.judges_name))
        read = 0
        for self._one_of in (HELD_OUT, *OF_FEW):
            found, read = self._judging()
            if found or not read:
                break
        if not found:
            raise ValueError(_too_few(read, "none is held out to judge by"))
        return found[self._rank::self._size]

    def _judging(self) -> tuple[list[Batch], int]:
        """(the samples that judge, as many samples as were read to find them)."""
        found: list[Batch] = []
        read = kept = 0
        self._seed_with(0)
        for batch in map(self._without_labels, self._batches):
            count = samples_in(batch)
            read += count
            rows = held_out_rows(batch, self._one_of).nonzero()[:, 0][:JUDGES - kept]
            kept += len(rows)
            if len(rows):
                found.append(take_rows(batch, rows))
            if kept == JUDGES:
                break
        return found, read

    def __call__(self, start: Position, least: int) -> Iterator[tuple[Batch, Position]]:
        """(a batch to train on, the position behind it), without end; batches of fewer than `least` samples are left
        out.

        Raises ValueError where what was read up to `start` is not what it was, or nothing is left to train on.
        """
        number = start.before
        for epoch in itertools.count(start.epoch):
            self._seed_with(epoch)
            digest, before, read, left = "", number, 0, 0
            for index, batch in enumerate(self._batches, 1):
                state = torch.get_rng_state()  # of which a loader may draw between its batches
                batch = self._without_labels(batch)
                digest = digest_of(digest, batch) if self._digests else ""
                read += samples_in(batch)
                batch = self._to_train_on(batch)
                left += samples_in(batch)
                if rows_in(batch) < least:
                    continue
                number += 1
                position = Position(epoch, index, number, before, digest)
                if epoch == start.epoch and index <= start.index:
                    if index == start.index and position != start:
                        raise ValueError(f"batches: the first {index} of epoch {epoch + 1} are not those that the run "
                                         "was trained on, or not in that order; give the same again")
                elif number % self._size == self._rank:
                    yield batch, position
                    torch.set_rng_state(state)
            if number == before:
                out = read - left
                raise ValueError(
                    _too_few(read, "all are held out to judge by, as those are that hold the same") if not left else
                    f"batches: none has {least} samples to train on, as BatchNorm needs: " + (
                        f"{out} of {counted(read, 'sample')} judge{'s' * (out == 1)} and {'is' if out == 1 else 'are'} "
                        f"not trained on; give larger batches, of {ENOUGH} or more, or held_out=" if out else
                        "give larger ones"))

    def _to_train_on(self, batch: Batch) -> Batch:
        if self._held_out is not None:
            return batch
        rows = (~held_out_rows(batch, self._one_of)).nonzero()[:, 0]
        return take_rows(batch, rows)

    def _without_labels(self, batch: Batch, name: str = "batches") -> Batch:
        if self._first_only:
            check_batch(batch, name)
        return (batch[0],) if self._first_only and isinstance(batch, (tuple, list)) else batch

    def _seed_with(self, epoch: int) -> None:
        torch.manual_seed(self._seed + epoch)


def _too_few(read: int, what: str) -> str:
    return "batches: there is none, or none that holds a sample" if not read else \
        f"batches: they hold {counted(read, 'sample')}, of which, by what they hold, {what}; give {ENOUGH} or more " \
        "that differ, or held_out="


@dataclass(frozen=True)
class _Share:
    """Every size-th batch."""

    batches: Iterable[Batch]
    rank: int
    size: int
    without_labels: Callable[[Batch], Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.without_labels, itertools.islice(iter(self.batches), self.rank, None, self.size))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch that autograd takes, on `device`."""
    return map_tensors(lambda tensor: (tensor.clone() if tensor.is_inference() else tensor).to(
        device, non_blocking=True), batch)

