"""Work shared out among processes: its order, its errors, and what is left of the processes.

New processes once, which import PyTorch anew; where it is no matter, forks, which have it.
"""

import multiprocessing
import os
import time
from collections.abc import Callable

import pytest
from started import HELPERS

from fastscore.cli import side_by_side
from fastscore.cli.processes import ProcessLostError


def square(number: int, done: Callable[[], object]) -> tuple[int, int]:
    for _ in range(number):
        done()
    return number ** 2, os.getpid()


def lost(number: int, done: Callable[[], object]) -> int:
    if number == 2:
        os._exit(1)
    return number


def wrong(number: int, done: Callable[[], object]) -> int:
    if number == 2:
        raise ValueError(f"{number} is wrong")
    time.sleep(600)  # the others are not waited for
    return number


class OfTwo(ValueError):
    """Is not made again of what it says."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what}: {number}")


def wrong_twice(number: int, done: Callable[[], object]) -> int:
    raise OfTwo("work", number) if number == 1 else ValueError(f"work: {number}", lambda: number)


@pytest.fixture(autouse=True)
def _no_process_stays() -> object:
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(side_by_side.multiprocessing, "get_context", lambda method: fork)


@pytest.mark.parametrize("processes", [1, 2])
def test_in_order_and_told_of_progress(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.syspath_prepend(HELPERS / "without_timm")
    ticks = list[int]()
    found = side_by_side.each(square, range(1, 4), processes, lambda: ticks.append(os.getpid()))
    assert [value for value, _ in found] == [1, 4, 9]
    assert ticks == [os.getpid()] * 6
    workers = {worker for _, worker in found}
    assert len(workers) == processes
    assert (os.getpid() in workers) == (processes == 1)


@pytest.mark.usefixtures("_forked")
def test_an_error_ends_all_processes() -> None:
    with pytest.raises(ValueError, match="2 is wrong"):
        side_by_side.each(wrong, range(1, 3), 2, lambda: None)


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("number", [1, 2])
def test_an_error_that_no_pipe_takes_is_told(number: int) -> None:
    with pytest.raises(RuntimeError, match=f"^(OfTwo|ValueError): .*work: {number}"):
        side_by_side.each(wrong_twice, [number, number], 2, lambda: None)


@pytest.mark.usefixtures("_forked")
def test_a_process_that_ends_early() -> None:
    with pytest.raises(ProcessLostError, match="ended early"):
        side_by_side.each(lost, range(1, 3), 2, lambda: None)
