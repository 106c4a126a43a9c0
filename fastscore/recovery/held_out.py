"""Samples held out to judge by, told by what they hold: neither their order nor the batch size matters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fastscore.batches.checks import check_batch, check_iterable
from fastscore.batches.parts import Batch, can_be_cut, first_input, map_tensors
from fastscore.fingerprints import sample_ids
from fastscore.wording import counted


@dataclass(frozen=True)
class Part:
    """Batches without the samples that are held out, or those alone, as `judges` says; a batch of which nothing is left
    is left out.

    batches: read anew at every reading of the part. one_of: one of so many samples is held out. shift: by which choices
    of the same samples are independent of each other. name: what the batches are called where none must be left
    without a sample that does not judge, which is an error then.
    """

    batches: Iterable[Batch]
    one_of: int
    judges: bool
    shift: int = 0
    name: str = ""

    def __iter__(self) -> Iterator[Batch]:
        read = given = 0
        for batch in self.batches:
            read += samples_in(batch, self.name or "held_out")
            rows = (held_out_rows(batch, self.one_of, self.shift) == self.judges).nonzero()[:, 0]
            given += len(rows)
            if len(rows):
                yield take_rows(batch, rows)
        if self.name and not self.judges and read and not given:
            raise ValueError(f"{self.name}: {counted(read, 'sample')}, of which all are held out to judge by, as those "
                             "are that hold the same; give more, or held_out= batches")


def split(batches: Iterable[Batch], held_out: Iterable[Batch] | None, one_of: int,
          name: str) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """(batches to work on, batches to judge by), disjoint.

    batches: a list or a DataLoader, called `name` in errors; it may shuffle, but not change samples at random.
    held_out: to judge by; None: one of `one_of` samples of `batches`. Raises TypeError for what is no iterable of
    batches, ValueError for what can be read only once.
    """
    check_batches(batches, name)
    if held_out is not None:
        check_batches(held_out, "held_out")
        return batches, held_out
    return Part(batches, one_of, False, name=name), Part(batches, one_of, True, name=name)


def check_batches(given: object, name: str) -> None:
    """Raise TypeError, or ValueError, where `given` is no iterable of batches that can be read several times."""
    check_iterable(given, name)
    if isinstance(given, Iterator):
        raise ValueError(f"{name}: it can be read only once, and is read several times: give a list of batches, or a "
                         "DataLoader")


def rows_in(batch: Batch, name: str = "batches") -> int:
    """How many rows the first tensor of a batch has. Raises TypeError, naming the argument, for one without rows."""
    check_batch(batch, name, counted=True)
    return len(first_input(batch))


def samples_in(batch: Batch, name: str = "batches") -> int:
    """How many samples a batch holds, one row each; one, where they cannot be told by rows. See rows_in."""
    rows = rows_in(batch, name)
    return rows if can_be_cut(batch) else min(rows, 1)


def held_out_rows(batch: Batch, one_of: int, shift: int = 0) -> Tensor:
    """bool [N]: the samples of a batch that judge, of so many as `samples_in` says."""
    tensor = first_input(batch)
    ids = sample_ids(tensor if can_be_cut(batch) or not len(tensor) else tensor[None])
    return (ids.cpu() >> shift) % one_of == 0


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """A batch of some of its samples, int64 [R]."""
    count = samples_in(batch)
    if len(rows) == count:
        return batch
    return map_tensors(lambda tensor: tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == count
                       else tensor, batch)
