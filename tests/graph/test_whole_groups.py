"""Convolutions with one input, or one output, in each of their groups: depth multipliers, and sums of fixed sets; and
GroupNorms of one channel in each. What goes of them is whole groups, with all that is read and made there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


class Stages(nn.Module):
    """Two streams of residual blocks, of which the second is made of the first by a depth multiplier, as in FastViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1, groups=8)
        self.norm, self.point = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
        self.up, self.back = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.last, self.head = nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.down(self.stem(x).relu())).relu())
        x = x + self.back(self.up(x).tanh())
        return self.head(self.last(x).tanh().mean((2, 3)))


class Waves(nn.Module):
    """Filters of time, and several of space for each, as in EEGNet."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 4, (1, 5)), nn.Conv2d(4, 12, (3, 1), groups=4, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(12)])
        self.alone, self.point, self.head = nn.Conv2d(12, 12, (1, 3), groups=12), nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.elu(self.norms[1](self.space(self.norms[0](self.time(x)))))
        return self.head(nn.functional.elu(self.point(self.alone(x))).mean((2, 3)))


class Sets(nn.Module):
    """Sums of fixed sets of three channels, of two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 9, 3, padding=1), nn.Conv1d(3, 6, 1)
        self.sums, self.head = nn.Conv1d(15, 5, 3, padding=1, groups=5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x).tanh(), self.two(x).relu()], 1)
        return self.head(self.sums(x).tanh().mean(2))


class Twice(nn.Module):
    """A multiplier that runs twice, and another behind it; what it makes meets what a view has repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.multiplier = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.merger, self.head = nn.Conv2d(8, 4, 3, padding=1, groups=4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.merger(self.multiplier(x).relu()) + x
        y = self.multiplier(x).tanh() * x.repeat_interleave(2, 1).sigmoid()
        return self.head(y.mean((2, 3)))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Alone(nn.Module):
    """A GroupNorm of one channel in each group, as Wav2Vec 2.0 begins with, and a stream that it normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv1d(2, 6, 3), nn.GroupNorm(6, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.last, self.head = nn.GroupNorm(6, 6, affine=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.one(x)))
        return self.head(self.last(x + self.two(x)).tanh().square().mean(2))


# name -> (network, shape of a sample, groups, a layer that loses whole groups, the more channels of each of these)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], str, int]] = {
    "stages": (Stages, (3, 6, 6), ["stem", "point", "up"], "last", 2),
    "waves": (Waves, (1, 3, 12), ["time", "point"], "space", 3),
    "sets": (Sets, (3, 7), ["one", "two"], "sums", 3),
    "alone": (Alone, (2, 9), ["one"], "norm", 1),
    "twice": (Twice, (3, 5, 5), ["one"], "multiplier", 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_go(kind: str, tmp_path: Path) -> None:
    """Scores by brute force, smaller = masked, export, training and files; and each group stays what it was."""
    build, shape, names, layer, each = KINDS[kind]
    result = check(build, _noise(3, *shape), names, tmp_path)
    dense, small = noisy(build).get_submodule(layer), result.model.get_submodule(layer)
    if kind == "alone":
        assert small.num_groups == small.num_channels < dense.num_channels
        return
    assert small.groups < dense.groups
    assert small.in_channels // small.groups == dense.in_channels // dense.groups
    assert small.out_channels // small.groups == dense.out_channels // dense.groups
    assert max(small.in_channels, small.out_channels) == each * small.groups


def test_units_are_groups() -> None:
    graphs = {kind: trace(noisy(build), _noise(3, *shape)) for kind, (build, shape, *_) in KINDS.items()}
    units = {(kind, group.name): group.unit.tolist() for kind, graph in graphs.items() for group in graph.groups}
    assert (units["stages", "stem"], units["stages", "point"]) == (list(range(8)), list(range(16)))
    assert units["sets", "one"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert units["twice", "one"] == [0, 1, 2, 3]


def test_costs_are_those_of_what_is_left() -> None:
    """Macs and parameters of a budget are counted before anything goes."""
    model, x = noisy(Stages), _noise(2, 3, 6, 6)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, params=0.6)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.report.params[1]
    again = fastscore.prune(model, scores, x, macs=result.report.macs[1] / result.report.macs[0])
    assert again.report.macs[1] <= result.report.macs[1]


@pytest.mark.parametrize("kind", ["conv", "norm"])
def test_first_places_of_groups_and_then_groups_of_one_place(kind: str, tmp_path: Path) -> None:
    """A file says of the dense model what goes, whatever its convolution, or its norm, had become between."""
    def build() -> nn.Module:
        middle = nn.Conv2d(8, 16, 3, groups=4) if kind == "conv" else \
            nn.Sequential(nn.GroupNorm(4, 8), nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16))
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), middle, nn.Tanh(),
                             nn.Conv2d(16, 5, 1), nn.Flatten(), nn.Linear(5 * 4, 2))

    model, x, seen = noisy(build), _noise(2, 3, 6, 6), []
    for share in (0.5, 0.7, 0.7):
        scores = fastscore.score(model, [x], progress=False)
        model = fastscore.prune(model, scores, x, channels=share, scope="layer", compensate=False).model
        seen.append((model[2].in_channels, model[2].out_channels, model[2].groups) if kind == "conv" else
                    (model[2][0].num_channels, model[2][2].num_channels, model[2][0].num_groups))
    assert seen[0] == (4, 8, 4)
    assert seen[2][2] < 4
    fastscore.save_pruned(model, tmp_path / "small")
    loaded = fastscore.load_pruned(noisy(build, seed=3), tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)
