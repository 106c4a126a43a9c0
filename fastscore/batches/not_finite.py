"""Which sample it was, where an error says that there is NaN or infinity."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

import torch

from fastscore.batches.parts import Batch, first_tensor
from fastscore.wording import counted

P = ParamSpec("P")
R = TypeVar("R")


def naming_samples(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose FloatingPointErrors say in which sample of its arguments of these names, iterables of batches,
    NaN or infinity is found; of functions in one another, the outermost says it, whose batches the user gave."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def named(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except FloatingPointError as error:
                given = signature.bind(*args, **kwargs).arguments
                bare: str = getattr(error, "bare", str(error))  # without what one within said of its batches
                found = next(filter(None, (_first(given.get(name), name) for name in names)), "")
                if not found:
                    raise
                raise naming(bare, found) from error

        return named

    return wrap


def naming(bare: str, found: str) -> FloatingPointError:
    """An error that says `bare`, and what was found in batches; whoever knows better says the one without the other."""
    error = FloatingPointError(f"{bare}; {found}")
    error.bare = bare  # type: ignore[attr-defined]
    return error


def in_batch(batch: Batch, number: int) -> str:
    """Which samples of the batch of this number are not finite; empty where all are."""
    rows = _rows(batch)
    return said_of(f"sample {rows[0]} of batch {number}", len(rows) - 1, "0, empty ones aside") if rows else ""


def said_of(first: str, others: int, since: str = "0") -> str:
    """That there is such a value in `first`, a sample, and in so many others. since: how batches are counted."""
    more = f" and {counted(others, 'other sample')}" if others else ""
    return f"{first} (counted from {since}){more} hold{'' if others else 's'} such a value: leave " \
        f"{'them' if others else 'it'} out"


def _rows(batch: Batch) -> list[int]:
    tensor = first_tensor(batch)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return []
    rows: list[int] = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[:, 0].tolist()
    return rows


def _first(batches: Iterable[Batch] | None, name: str) -> str:
    """Where the first such sample is, and how many there are; empty where there is none, or it cannot be told."""
    if batches is None or isinstance(batches, Iterator):
        return ""
    where, others = "", 0
    for number, batch in enumerate(batches):
        if rows := _rows(batch):
            others += len(rows) - (not where)
            where = where or f"{name}: sample {rows[0]} of batch {number}"
    return where and said_of(where, others)
