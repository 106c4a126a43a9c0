"""Layers that work in groups of channels, on a concatenation of what several layers make, as in diffusion's U-Nets."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy, sums

import fastscore
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace


class Skip(nn.Module):
    """Two layers, of 8 and of `other` channels, of which what reads both makes groups."""

    def __init__(self, reader: nn.Module, other: int = 8) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, other, 3, padding=1)
        self.reader, self.head = reader, nn.Conv2d(12 + 4 * isinstance(reader, nn.GroupNorm), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x).relu()
        return self.head(self.reader(torch.cat([one, self.other(one).relu()], 1)).tanh()).mean((2, 3))


def _x() -> Tensor:
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()


def test_grouped_convolution(tmp_path: Path) -> None:
    """Everything from data to a file, by brute force; the same place of each group is one unit, whoever makes it."""
    result = check(lambda: Skip(nn.Conv2d(16, 12, 3, padding=1, groups=4)), _x(), ["one", "reader"], tmp_path)
    small = result.model
    assert small.one.out_channels == small.other.out_channels < 8
    assert small.reader.in_channels == 2 * small.one.out_channels


class Parted(nn.Module):
    """Two layers, of 8 and of `other` channels, whose concatenation is cut into equal parts."""

    def __init__(self, other: int, parts: int) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, other, 3, padding=1)
        width = (8 + other) // parts
        self.readers = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x).relu()
        parts = torch.cat([one, self.other(one)], 1).tanh().chunk(len(self.readers), 1)
        return sum(reader(part) for reader, part in zip(self.readers, parts, strict=True)).mean((2, 3))


@pytest.mark.parametrize(("other", "parts"), [(8, 2), (4, 3), (8, 4)])
def test_equal_parts(other: int, parts: int, tmp_path: Path) -> None:
    """As many channels of each part go, whoever makes them: by brute force, and smaller = masked."""
    result = check(lambda: Parted(other, parts), _x(), ["one"], tmp_path)
    small = result.model
    assert {reader.in_channels for reader in small.readers} == {(small.one.out_channels + small.other.out_channels)
                                                               // parts}
    assert small.one.out_channels < 8


class Thirds(nn.Module):
    """Three layers of 4 channels, cut into two parts of 6: none makes a whole part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(5, 4) for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.cat([layer(x) for layer in self.layers], 1).chunk(2, 1)
        return self.head(one.tanh() + other.relu())


def test_parts_that_no_layer_makes_alone_are_kept() -> None:
    skipped = trace(Thirds(), torch.randn(2, 5)).skipped
    assert {skipped[f"layers.{i}"] for i in range(3)} == {
        "its channels are cut into equal parts together with others (SplitBackward0)"}


def test_group_norm() -> None:
    """Scores by brute force; without a unit, groups are as wide as each other, and the rest is what a network with the
    smaller weights computes."""
    model, x = noisy(lambda: Skip(nn.GroupNorm(4, 16))), _x()
    (group,) = trace(model, x).groups
    assert {member.layer for member in group.members} == {"one", "other", "reader", "head"}
    assert group.unit.tolist() == [0, 1, 2, 3] * 2
    v = torch.randn(3, 2, dtype=torch.float64)
    scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: (output * v).sum())
    exact = sums(model, group, x, v).square().mean(0)
    torch.testing.assert_close(scores["one"].double(), exact, rtol=1e-5, atol=1e-9)
    small = remove_channels(model, [group], {"one": torch.tensor([1, 5])})
    assert (small.one.out_channels, small.other.out_channels, small.reader.num_channels) == (6, 6, 12)
    kept = torch.tensor([place for place in range(16) if place % 4 != 1])
    again = noisy(lambda: Skip(nn.GroupNorm(4, 16)))
    torch.testing.assert_close(small.head.weight, again.head.weight[:, kept])
    torch.testing.assert_close(small.reader.weight, again.reader.weight[kept])
    assert small(x).shape == (3, 2)


@pytest.mark.parametrize("other", [6, 24])
def test_other_widths(other: int) -> None:
    """Groups that lie across both layers, and groups of which one layer makes more than the other."""
    total = 8 + other
    model, x = noisy(lambda: Skip(nn.Conv2d(total, 12, 1, groups=2), other)), _x()
    graph = trace(model, x)
    group = next(group for group in graph.groups if group.name == "one") if other == 6 else None
    if group is None:  # 16 places of a group, of which the first layer makes 8: the other's alone name them all
        group = next(group for group in graph.groups if group.name == "other")
    places = {member.layer: dict(zip(member.index.tolist(), group.unit[member.channel].tolist(), strict=True))
              for member in group.members if member.role == "consumer"}["reader"]
    assert len(places) == total
    assert all(places[place] == places[place + total // 2] for place in range(total // 2))


class Resampler(nn.Module):
    """As in diffusers: it compares its input with a width of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(x)


def test_width_of_an_owner(tmp_path: Path) -> None:
    """A width that the module which holds a layer keeps goes with the layer's inputs."""
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Resampler(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))

    result = check(build, _x(), ["0", "2.conv"], tmp_path)
    assert result.model[2].channels == result.model[0].out_channels == 4
