"""What long work says on stderr: nothing for two seconds, then a bar. Where stderr is no terminal, which would keep
every state of a bar, a line now and then."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import distributed
from tqdm import tqdm

from fastscore.wording import lasting

SECONDS = 2.0  # that pass before anything is said
BETWEEN_LINES = 30.0  # seconds, where there is no terminal
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


class Bar(Protocol):
    """What work says of itself to a bar; tqdm's names."""

    def update(self, n: float = 1) -> object:
        """Add n to what is done."""

    def set_description(self, desc: str) -> object:
        """Put `desc` in the place of what is being done."""

    def set_postfix_str(self, s: str) -> object:
        """Say `s` behind it."""


class _Lines:
    """A line on stderr when BETWEEN_LINES have passed since the last."""

    def __init__(self, what: str, unit: str, total: float | None, done: float) -> None:
        self._what, self._unit, self._total, self._done, self._more = what, unit, total, done, ""
        self._before = done
        self._start = self._said = time.perf_counter()

    def update(self, n: float = 1) -> None:
        self._done += n
        now = time.perf_counter()
        if now - self._said >= BETWEEN_LINES:
            self._said = now
            of, left, took = "", "", now - self._start
            if self._total is not None:
                of = f" of {self._total:g}"
                if self._before < self._done < self._total:
                    left = f", about {lasting(took * (self._total - self._done) / (self._done - self._before))} left"
            print(f"{self._what}: {self._done:g}{of}{self._unit} in {took:.0f} s{left}{self._more}", file=sys.stderr,
                  flush=True)

    def set_description(self, desc: str) -> None:
        self._what = desc

    def set_postfix_str(self, s: str) -> None:
        self._more = f"; {s}"


@contextmanager
def bar(what: str, unit: str, total: float | None = None, done: float = 0) -> Iterator[Bar]:
    """A bar that appears after two seconds and goes when the block ends; without a terminal, lines.

    what: is done. unit: of it, with a space. total, done: in that unit.
    """
    if not sys.stderr.isatty() and not _silent():
        yield _Lines(what, unit, total, done)
        return
    with tqdm(total=total, initial=done, desc=what, unit=unit, delay=SECONDS, leave=False, disable=_silent()) as made:
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
