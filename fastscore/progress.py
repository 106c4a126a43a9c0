"""What long work says on stderr: nothing for two seconds, then a bar, or a line."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import distributed
from tqdm import tqdm

SECONDS = 2.0  # that pass before anything is said
_SHOWN = ContextVar("shown", default=True)


@contextmanager
def shown(progress: bool) -> Iterator[None]:
    """In the block, `progress` says whether anything is said; nothing is, where a block around it is silent."""
    token = _SHOWN.set(progress and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(token)


def _silent() -> bool:
    """Nobody asked for it, or another process says it."""
    return not _SHOWN.get() or (distributed.is_available() and distributed.is_initialized()
                                and distributed.get_rank() > 0)


@contextmanager
def bar(what: str, unit: str, total: int | None = None) -> "Iterator[tqdm[Any]]":
    """A bar that appears after two seconds and goes when the block ends. what: is done. unit: of it, with a space."""
    with tqdm(total=total, desc=what, unit=unit, delay=SECONDS, leave=False, disable=_silent()) as made:
        yield made


@contextmanager
def working(what: str) -> Iterator[None]:
    """Where the block takes more than two seconds: a line that says `what`, and how long it took in the end."""
    if _silent():
        yield
        return
    said = threading.Event()

    def say() -> None:
        said.set()
        tqdm.write(f"{what} ...", file=sys.stderr)

    start, timer = time.perf_counter(), threading.Timer(SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        tqdm.write(f"{what}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
