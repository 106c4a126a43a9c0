"""Views of sizes that a module reads of a list: its own, or one of a config that others hold, too."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

WIDTHS = (5, 6)
CONFIG = SimpleNamespace(widths=list(WIDTHS), depths=[6, 6], groups=6)
X = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """Convolutions, and a classifier of the mean of what they make, viewed as tokens, as PVT v2 and SegFormer do."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.widths, self.alike = CONFIG, WIDTHS, [6, 6]
        self.first, self.last, self.classifier = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 4)

    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.config.widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x).relu()).relu()
        return self.classifier(self.tokens(x.permute(0, 2, 3, 1)).mean(1))


class Own(Net):
    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.widths[1])


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.config.widths[1])


class InBoth(Net):
    """A child reads the same, of the same config."""

    def __init__(self) -> None:
        super().__init__()
        self.child = _Tokens()

    def tokens(self, x: Tensor) -> Tensor:
        return self.child(x).view(len(x), 4, 4, self.config.widths[-1]).flatten(1, 2)


class Alike(Net):
    """Of two numbers that are alike."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.alike[-1])


class AlikeInConfig(Net):
    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.config.depths[-1])


class Scaled(Net):
    """Which says something else, too."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) * self.config.widths[-1] ** 0.5


@pytest.mark.parametrize("kind", [Net, Own, InBoth])
def test_widths_of_lists_are_narrowed_in_the_copy(kind: type[nn.Module], tmp_path: Path) -> None:
    small = check(kind, X, ["first", "last"], tmp_path).model
    held = small.widths if kind is Own else small.config.widths
    assert list(held) == [5, 3]
    assert list(WIDTHS) == CONFIG.widths == [5, 6]
    if kind is InBoth:
        assert small.child.config.widths == [5, 3]


@pytest.mark.parametrize("kind", [Alike, AlikeInConfig, Scaled])
def test_what_a_list_does_not_tell_stays(kind: type[nn.Module]) -> None:
    graph = trace(noisy(kind), X)
    assert [group.name for group in graph.groups] == ["first"]
    assert ("config.widths of Scaled" if kind is Scaled else "classifier reads something else") in graph.skipped["last"]
