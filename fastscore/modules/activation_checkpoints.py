"""Reentrant activation checkpoints, which hide a part of the graph and take backward() alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


class _PlainCall:
    """In place of checkpoint.CheckpointFunction."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """torch.utils.checkpoint.checkpoint(..., use_reentrant=True) calls its layers as they are in this block."""
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _PlainCall  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
