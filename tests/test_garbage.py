"""Searches for garbage: seldom in a block, and as before behind it."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.garbage import seldom_searched
from fastscore.graph.tracing import trace


@pytest.fixture(autouse=True)
def as_python_starts() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_searches_come_back_as_they_were_however_blocks_overlap() -> None:
    one, other = seldom_searched(), seldom_searched()
    one.__enter__()
    assert gc.get_threshold()[0] > 700
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold()[0] > 700
    other.__exit__(None, None, None)
    assert gc.get_threshold() == (700, 10, 10)
    with pytest.raises(ValueError, match="whatever"), seldom_searched():
        raise ValueError("whatever")
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (1_000_000, 5, 5)], ids=["never", "hardly ever"])
def test_whoever_searches_less_often_goes_on_so(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with seldom_searched():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_tracing_and_pruning_search_seldom_and_leave_it_as_it_was() -> None:
    seen = list[int]()

    class Seeing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.get_threshold()[0])
            made: Tensor = super().forward(x)
            return made

    model, batch = Seeing(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    trace(model, batch)
    assert min(seen) > 700
    scores = fastscore.score(model, [batch], progress=False)
    assert seen[-1] == 700  # a run may be long
    seen.clear()
    fastscore.prune(model, scores, batch, params=0.7)
    assert min(seen) > 700
    assert gc.get_threshold() == (700, 10, 10)
