"""What the code of a model sets after its constructor rules no branch out, whatever it was for the examples."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_met_in_training import Flagged
from test_unrun import Net, X
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")


class OfLarge(Net):
    """A flag that each call sets."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.share, self.mode, self.size = False, 0.0, "short", 0
        self.kind: Any = nn.ReLU
        self.config = SimpleNamespace(large=False)

    def forward(self, x: Tensor) -> Tensor:
        self.see(x.shape[-1] > 8)
        return super().forward(x)

    def see(self, large: bool) -> None:
        self.large = large

    def between(self, h: Tensor) -> Tensor:
        if self.large:
            h = h - h.mean(1, keepdim=True)
        return h


class EndsEarly(OfLarge):
    """What comes behind a return."""

    def between(self, h: Tensor) -> Tensor:
        if not self.large:
            return h
        return h.flip(1)


class ByName(OfLarge):
    """It is set by its name."""

    def see(self, large: bool) -> None:
        setattr(self, "large", large)  # noqa: B010


class ByItsDict(OfLarge):
    """Or so."""

    def see(self, large: bool) -> None:
        self.__dict__.update(large=large)


class OfConfig(OfLarge):
    """One of a config."""

    def see(self, large: bool) -> None:
        self.config.large = large

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.config.large else h


class Word(OfLarge):
    """A word."""

    def see(self, large: bool) -> None:
        self.mode = "long" if large else "short"

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.mode == "long" else h


class Kind(OfLarge):
    """A class."""

    def see(self, large: bool) -> None:
        self.kind = nn.Tanh if large else nn.ReLU

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.kind is nn.Tanh else h


class Share(OfLarge):
    """A number that counts nothing."""

    def see(self, large: bool) -> None:
        self.share = float(large)

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.share > 0.0 else h


class Computed(OfLarge):
    """A property that is compared."""

    def see(self, large: bool) -> None:
        self.size = 9 * large

    @property
    def name(self) -> str:
        return "long" if self.size else "short"

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.name == "long" else h


class Item(OfLarge):
    """One of several that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {"mode": "short"}

    def see(self, large: bool) -> None:
        self.names["mode"] = "long" if large else "short"

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.names["mode"] == "long" else h


class Block(nn.Module):
    """It is told from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.large = False

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.large else h


class OfBlock(OfLarge):
    """A flag of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def see(self, large: bool) -> None:
        self.block.large = large

    def between(self, h: Tensor) -> Tensor:
        return self.block(h)


class OnDemand(OfLarge):
    """A method for users sets it."""

    def see(self, large: bool) -> None:
        """Nothing."""

    def enable(self) -> None:
        self.large = True


@pytest.mark.parametrize("kind", [OfLarge, EndsEarly, ByName, ByItsDict, OfConfig, Word, Kind, Share, Computed, Item,
                                  OfBlock, OnDemand])
def test_channels_stay_that_such_a_branch_means(kind: type[OfLarge]) -> None:
    assert "which example_inputs do not come to, would be something else" in trace(noisy(kind), X).skipped["first"]


class OnlyBuilt(Net):
    """A method that only the constructor calls sets it."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.large = False

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.large else h


def test_what_only_a_constructor_calls_is_a_part_of_it() -> None:
    assert "first" in fastscore.score(noisy(OnlyBuilt), [X], progress=False)


class Switched(Flagged):
    """A method for users has it augment what it is trained with."""

    def __init__(self) -> None:
        super().__init__(False)

    def augment(self) -> None:
        self.augments = self.config.augments = True


def test_so_it_is_in_training() -> None:
    assert set(fastscore.score(Switched().eval(), [torch.randn(3, 7, 4)], progress=False)) == {"three"}
