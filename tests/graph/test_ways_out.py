"""Reasons that name a way out: as the model is, channels stay and the reason is true; by that way they go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(3, 5, dtype=torch.float64)
IMAGES = torch.randn(3, 2, 5, 4, dtype=torch.float64)


class Between(nn.Module):
    """Of two layers. way: what the code does between them."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.last, self.way = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2), way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self.b(self.a(x).relu())).tanh())


class Image(Between):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__(way)
        self.a, self.b, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)



class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


NORMS: dict[str, tuple[type[Between], Callable[[Tensor], Tensor], Callable[[], nn.Module], str]] = {
    "layer_norm": (Between, lambda x: F.layer_norm(x, (6,)), lambda: nn.LayerNorm(6), "F.layer_norm runs over"),
    "rms_norm": (Between, lambda x: F.rms_norm(x, (6,)), lambda: nn.RMSNorm(6), "runs over"),
    "by hand": (Between, lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
                lambda: nn.RMSNorm(6, eps=1e-6), "an operation runs over all its channels (MeanBackward1): "),
    "mean and variance": (Between, lambda x: (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(), lambda: nn.LayerNorm(6),
        "an operation runs over all its channels (MeanBackward1): "),
    "normalize": (Between, lambda x: F.normalize(x, dim=-1), Normalize,
                  "an operation runs over all its channels (LinalgVectorNormBackward0): "),
    "group_norm": (Image, lambda x: F.group_norm(x, 2), lambda: nn.GroupNorm(2, 6),
                   "F.group_norm runs over groups of its channels: "),
}


@pytest.mark.parametrize("kind", NORMS)
def test_normalisations_in_code_are_followed_in_modules_of_their_own(kind: str) -> None:
    build, way, module, reason = NORMS[kind]
    x = IMAGES if build is Image else X
    graph = trace(noisy(lambda: build(way)), x)
    assert "b" not in {group.name for group in graph.groups}
    assert reason in graph.skipped["b"]
    assert "a normalisation is followed where a module does it" in graph.skipped["b"]
    sample = torch.randn(3, 6, 4, 4).double() if build is Image else torch.randn(3, 6).double()
    torch.testing.assert_close(way(sample), module().double()(sample))
    model = noisy(lambda: build(module()))
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["a", "b"]
    small = fastscore.prune(model, scores, x, channels=0.6, scope="layer", compensate=False)
    with torch.no_grad(), fastscore.mask(model, scores, small, x, compensate=False):
        torch.testing.assert_close(small.model(x), model(x))


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu() + 1


class Shares(nn.Module):
    """One parameter, by which two modules multiply; or one module, that is called twice."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.one = Multiplies()
        self.two = Multiplies() if modules == 2 else self.one
        self.two.weight = self.one.weight
        self.first, self.mid, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.mid(self.one(self.first(x).relu())).relu()))


def test_a_parameter_of_two_modules_goes_where_one_holds_it(tmp_path: Path) -> None:
    skipped = trace(noisy(lambda: Shares(2)), X).skipped
    for name in ("one", "two"):
        assert skipped[name].startswith("the code of Multiplies reads its weight [6, 6], which other modules hold, too")
    check(lambda: Shares(1), X, ["one.weight", "first"], tmp_path)


class Depthwise(nn.Module):
    """groups: as the code has them."""

    def __init__(self, groups: Callable[[nn.Module], int]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.weight, self.c, self.groups = nn.Parameter(torch.randn(6, 1, 3, 3) / 3), 6, groups

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(self.first(x).relu(), self.weight, groups=self.groups(self)).relu())


def test_groups_that_a_module_keeps_stay_and_those_of_the_weight_follow_it(tmp_path: Path) -> None:
    graph = trace(noisy(lambda: Depthwise(lambda module: module.c)), IMAGES)
    assert not graph.groups
    assert "convolves in 6 groups, whatever goes of the weight: groups=weight.shape[0] follows it" in \
        graph.skipped["first"]
    check(lambda: Depthwise(lambda module: module.weight.shape[0]), IMAGES, ["first"], tmp_path)


class Streams(nn.Module):
    """Hyper-connections: several residual streams, which small matrices mix, and a layer reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.read, self.write = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, h: Tensor) -> Tensor:
        y = self.down(self.up(torch.einsum("n,bnc->bc", self.read, h)).relu())
        return torch.einsum("mn,bnc->bmc", self.mix, h) + self.write[:, None] * y[:, None]


class HyperConnected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers, self.d, self.last = nn.Linear(5, 6), nn.Sequential(Streams(), Streams()), \
            nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.d(self.layers(self.first(x)[:, None].expand(-1, 4, -1)).sum(1)).relu())


def test_layers_within_hyper_connections_go_and_the_streams_stay(tmp_path: Path) -> None:
    assert "which cannot lose channels yet" in trace(noisy(HyperConnected), X).skipped["first"]
    check(HyperConnected, X, ["layers.0.up", "layers.1.up", "d"], tmp_path)
