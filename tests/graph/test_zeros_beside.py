"""Channels that zeros like them are concatenated to, as in a shortcut that has fewer, go as where these are padded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

X = torch.randn(3, 3, 5, 4, dtype=torch.float64)


class Widened(nn.Module):
    """way: what makes 8 channels of 4."""

    def __init__(self, way: Callable[[Tensor], Tensor], shortcut: bool = False) -> None:
        super().__init__()
        self.stem, self.up, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)
        self.head, self.way, self.shortcut = nn.Linear(5, 3), way, shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.way(x)
        y = (y + self.up(x)).relu() if self.shortcut else y
        return self.head(self.out(y).tanh().mean((2, 3)))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "behind": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "before": lambda x: torch.concat((torch.zeros_like(x), x), dim=1),
    "around": lambda x: torch.cat([(zeros := torch.zeros_like(x))[:, :0], x, zeros], 1),
    "of another place": lambda x: torch.cat([x, torch.zeros_like(x.flip(-1))], dim=1),
    "new": lambda x: torch.cat([x, x.new_zeros(x.shape)], 1),
    "new of a size": lambda x: torch.cat([x.new_zeros(size=x.size()), x], 1),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 0, 4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_zeros_stand_beside_goes(way: str, tmp_path: Path) -> None:
    check(partial(Widened, WAYS[way]), X, ["stem", "out"], tmp_path)


def test_a_sum_with_such_a_shortcut_goes_where_a_padded_one_does() -> None:
    like, padded = ({group.name: group.channels for group in trace(
        noisy(partial(Widened, WAYS[way], shortcut=True)), X).groups} for way in ("behind", "padded"))
    assert like.keys() >= padded.keys() >= {"out"}


def test_zeros_that_are_written_to_are_no_zeros() -> None:
    def way(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        zeros[:, 1] = x[:, 0]
        return torch.cat([x, zeros], 1)

    assert "stem" not in {group.name for group in trace(noisy(partial(Widened, way)), X).groups}


def test_zeros_of_a_size_that_is_computed_stay_with_the_way_out() -> None:
    graph = trace(noisy(partial(Widened, lambda x: torch.cat([x, x.new_zeros(len(x), x.shape[1], 3, 2)], 1))), X)
    assert graph.skipped["stem"] == "the code of Widened makes zeros of 4 channels that meet them, a number that it " \
                                    "computes: make them by torch.zeros_like, or let a module keep it"
