"""Pieces of work that have nothing to do with one another, in processes of their own."""

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from fastscore.cli.processes import ProcessLostError

R = TypeVar("R")
Work = Callable[[int, Callable[[], object]], R]


def each(work: Work[R], numbers: Sequence[int], processes: int, done: Callable[[], object]) -> list[R]:
    """What `work` makes of each number, in their order.

    work: work(number, done), which may call done() on the way, as which `done` is called here. With several processes
    it goes to them by pickle, and they take numbers in turn; with 1, it is done in this one. Raises ProcessLostError
    where a process has ended early, and whatever `work` raises.
    """
    if processes == 1:
        return [work(number, done) for number in numbers]
    found: dict[int, R] = {}
    with ExitStack() as stack:
        at_work = [stack.enter_context(_process(work, numbers[first::processes])) for first in range(processes)]
        while at_work:
            for pipe in wait(at_work):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except EOFError:
                    at_work.remove(pipe)
                    continue
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    done()
                else:
                    found.update([said])
    if len(found) < len(numbers):
        raise ProcessLostError("a process has ended early, as where memory runs out; with OMP_NUM_THREADS=1 in the "
                               "environment, one process does it all")
    return [found[number] for number in numbers]


@contextmanager
def _process(work: Work[Any], numbers: Sequence[int]) -> Iterator[Connection]:
    """A process that works, until the block ends; what it says comes out of the pipe."""
    context = multiprocessing.get_context("spawn")  # what PyTorch's threads hold would be lost in a fork
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, work, numbers), daemon=True)
    with closing(here):
        with _ignoring_interrupts():  # Ctrl-C goes to all processes: this one ends the others
            process.start()
        there.close()
        try:
            yield here
        finally:
            process.terminate()
            process.join()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """So does a process that is started in the block."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, work: Work[Any], numbers: Sequence[int]) -> None:
    """In the process of its own: say (number, what was made of it), None for done(), or what was raised."""
    try:
        for number in numbers:
            pipe.send((number, work(number, lambda: pipe.send(None))))
    except Exception as error:  # it is raised where the work was asked for
        pipe.send(_that_travels(error))


def _that_travels(error: Exception) -> Exception:
    """The error, or another that says the same where a pipe does not take it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of its class, whatever that does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
