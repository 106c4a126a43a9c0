"""Layers of whose outputs a part goes, where code splits them at numbers that modules keep, and something keeps the
rest: latents of keys and values beside what places turn, in multi-head latent attention."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0)).double()
LATENT, TURNED, MORE = 5, 4, 3


class Net(nn.Module):
    """A latent, which a layer reads, and a part of which each channel is needed for the next."""

    normalized = False

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.turned, self.widths = LATENT, TURNED, [LATENT, TURNED]
        self.config = SimpleNamespace(parts=[LATENT, TURNED])
        self.down, self.up, self.last = nn.Linear(6, LATENT + TURNED), nn.Linear(LATENT, 8), nn.Linear(8 + TURNED, 4)
        self.norm = nn.RMSNorm(LATENT, eps=1e-6) if self.normalized else nn.Identity()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = x.split([self.latent, self.turned], -1)
        return latent, turned

    def turn(self, turned: Tensor) -> Tensor:
        return turned.cumsum(-1)

    def forward(self, x: Tensor) -> Tensor:
        latent, turned = self.split(self.down(x))
        return self.last(torch.cat([self.up(self.norm(latent)).relu(), self.turn(turned)], -1))


class Normalized(Net):
    normalized = True


class Sliced(Net):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :self.latent], x[..., self.latent:]


class OfList(Net):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = torch.split(x, self.widths, -1)
        return latent, turned


class OfConfig(Net):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = torch.split(x, self.config.parts, -1)
        return latent, turned


class Behind(Net):
    """The latent lies behind what is turned."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned, latent = x.split([self.turned, self.latent], -1)
        return latent, turned


class OnBothSides(nn.Module):
    """Latents on both sides of what is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.turned, self.more = LATENT, TURNED, MORE
        self.down, self.up, self.other = nn.Linear(6, LATENT + TURNED + MORE), nn.Linear(LATENT, 8), nn.Linear(MORE, 8)
        self.last = nn.Linear(8 + TURNED, 4)

    def forward(self, x: Tensor) -> Tensor:
        latent, turned, more = self.down(x).split([self.latent, self.turned, self.more], -1)
        return self.last(torch.cat([self.up(latent).relu() + self.other(more).relu(), turned.cumsum(-1)], -1))


class Fixed(Net):
    """At numbers that stand in the code."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = x.split([5, 4], -1)
        return latent, turned


@pytest.mark.parametrize("kind", [Net, Normalized, Sliced, OfList, OfConfig, Behind, OnBothSides, Fixed])
def test_the_part_goes_that_nothing_keeps(kind: type[Any], tmp_path: Path) -> None:
    outputs = kind().down.out_features
    check(kind, X, ["down", "up"], tmp_path)
    group = next(group for group in trace(noisy(kind), X).groups if group.name == "down")
    (made,) = group.role("producer")
    begin = 0 if kind is Behind else LATENT
    assert made.index.tolist() == [*range(begin), *range(begin + TURNED, outputs)]


class Halves(Net):
    """A part of which the code has two parts."""

    def turn(self, turned: Tensor) -> Tensor:
        return torch.cat([-turned[..., 2:], turned[..., :2]], -1)


class HalvesOfSlices(Sliced, Halves):
    """The same, of slices."""


class HalvesKept(Halves):
    """At a number that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 2

    def turn(self, turned: Tensor) -> Tensor:
        return torch.cat([-turned[..., self.half:], turned[..., :self.half]], -1)


@pytest.mark.parametrize("kind", [Halves, HalvesOfSlices, HalvesKept])
def test_parts_of_parts(kind: type[Net], tmp_path: Path) -> None:
    """Where they begin is counted from where the part does."""
    check(kind, X, ["down", "up"], tmp_path)
    group = next(group for group in trace(noisy(kind), X).groups if group.name == "down")
    assert group.channels == LATENT + TURNED
    half = next(member for member in group.role("width") if member.attribute in ("half", "turn#2"))
    assert half.channel.tolist() == [LATENT, LATENT + 1]


class Both(Net):
    """The whole meets something, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(x)[..., 1:5]


class Summed(Net):
    """An operation runs over the latents, too."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = super().split(x)
        return latent.softmax(-1), turned


@pytest.mark.parametrize("kind", [Both, Summed])
def test_what_is_kept_in_all_its_parts_stays(kind: Callable[[], nn.Module]) -> None:
    graph = trace(noisy(kind), X)
    assert [group.name for group in graph.groups] == ["up"]
    assert "down" in graph.skipped
