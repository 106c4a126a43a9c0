"""Channels by which code chooses among the samples of a batch are kept: of one sample alone nothing of that shows.

The oracle: a channel may go where its absence at the layer that makes it, and at the layer that reads it, are the same,
in every batch.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

WIDTH = 8
CHOOSE = "they choose among the samples of a batch"
TOGETHER = "in a batch of several samples they come to read, or do not, in another way"


def held(x: Tensor) -> Tensor:
    """[N], of each sample."""
    return x.flatten(1).sum(1)


def beside(x: Tensor, of_sample: Tensor) -> Tensor:
    return of_sample.to(x).view(-1, *[1] * (x.dim() - 1))


def gated(x: Tensor) -> Tensor:
    mask = torch.zeros(len(x))
    mask[held(x).topk(max(1, len(x) // 2)).indices] = 1
    return x * beside(x, mask)


def picked(x: Tensor) -> Tensor:
    out, at = torch.zeros_like(x), held(x).topk(max(1, len(x) // 2)).indices
    out[at] = x[at] * 2
    return out


def hardest(x: Tensor) -> Tensor:
    """So many samples, of a batch of whatever size."""
    weight = torch.ones(len(x))
    weight[held(x.detach()).abs().topk(min(4, len(x))).indices] = 3
    return x * beside(x, weight)


def best(x: Tensor) -> Tensor:
    return x + x[held(x).argmax()]


def added_up(x: Tensor) -> Tensor:
    order = held(x).argsort()
    return x[order].cumsum(0)[order.argsort()]


def in_order(x: Tensor) -> Tensor:
    return x[held(x).argsort()]


def nearest(x: Tensor) -> Tensor:
    apart = torch.cdist(x.flatten(1), x.flatten(1)).detach()
    return x + x[(apart + 1e6 * torch.eye(len(x))).argmin(1)]


def served_first(x: Tensor) -> Tensor:
    """Two experts, each of which takes half of the samples, and no more."""
    taken, to = torch.ones(len(x)), (held(x) > 0).long()
    for number in range(2):
        taken[(to == number).nonzero()[max(1, len(x) // 2):, 0]] = 0
    return x * beside(x, taken)


def spread(x: Tensor) -> Tensor:
    """None of one sample alone."""
    return x * (1 + x.std(0, unbiased=False).mean())


def each_beside_its_mean(x: Tensor) -> Tensor:
    return x * (x > x.mean(0, keepdim=True))


def each_in_order(x: Tensor) -> Tensor:
    return x.sort(0).values


def back_in_place(x: Tensor) -> Tensor:
    order = held(x).argsort()
    return x[order][order.argsort()]


CHOOSING = (gated, picked, hardest, best, added_up, in_order, nearest, served_first)
EACH_ALONE = (each_beside_its_mean, each_in_order, back_in_place)


class Meeting(nn.Module):
    """way: what is done between two layers, whose channels are `kind`'s."""

    def __init__(self, kind: str, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.read = (nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 6, 1)) if kind == "images" else \
            (nn.Linear(3, WIDTH), nn.Linear(WIDTH, 6))
        self.head, self.way = nn.Linear(6, 3), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.way(self.make(x))).relu()
        return self.head(x.mean((2, 3)) if x.dim() > 2 else x)


def meeting(kind: str, way: Callable[[Tensor], Tensor], seed: int = 0) -> Meeting:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Meeting(kind, way).double().eval()


def batch(kind: str, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, *((5, 5) if kind == "images" else ()), generator=generator, dtype=torch.float64)


@torch.no_grad()
def may_go(model: Meeting, x: Tensor, channel: int) -> bool:
    made, read = copy.deepcopy(model), copy.deepcopy(model)
    made.make.weight[channel] = made.make.bias[channel] = 0
    read.read.weight[:, channel] = 0
    return torch.allclose(made(x), read(x))


@pytest.mark.filterwarnings("ignore:.*depends on which others:UserWarning")
@pytest.mark.parametrize(("way", "kind"), thinned([*CHOOSING, spread], ["images", "rows"]))
def test_channels_that_meet_those_of_other_samples_are_kept(way: Callable[[Tensor], Tensor], kind: str) -> None:
    for seed in range(2):
        model = meeting(kind, way, seed)
        assert not all(may_go(model, batch(kind, 6, other), channel) for other in range(4) for channel in range(WIDTH))
        assert all(may_go(model, batch(kind, 1, other), channel) for other in range(4) for channel in range(WIDTH))
        scores = fastscore.score(model, [batch(kind, 6, seed)], progress=False)
        assert list(scores) == ["read"]
        assert (TOGETHER if way is spread else CHOOSE) in scores.skipped["make"]


@pytest.mark.filterwarnings("ignore:.*depends on which others:UserWarning")
@pytest.mark.parametrize("kind", ["images", "rows"])
@pytest.mark.parametrize("way", EACH_ALONE)
def test_channels_that_are_each_treated_alone_go(way: Callable[[Tensor], Tensor], kind: str) -> None:
    model = meeting(kind, way)
    assert all(may_go(model, batch(kind, 6, other), channel) for other in range(4) for channel in range(WIDTH))
    assert list(fastscore.score(model, [batch(kind, 6, 0)], progress=False)) == ["make", "read"]


@pytest.mark.parametrize("first", [1, 6])
@pytest.mark.parametrize("way", [gated, in_order, spread])
def test_whoever_asks_first_is_told(way: Callable[[Tensor], Tensor], first: int) -> None:
    """On one sample, or several: the second is given what the first was."""
    model = meeting("rows", way)
    for samples in (first, 7 - first):
        graph = trace(model, batch("rows", samples, 0))
        assert [group.name for group in graph.groups] == ["read"]


class Mixture(nn.Module):
    """A layer decides which samples its experts take, which do not take all; whatever is inside of them may go."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(5, 2), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5))
                                     for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        to, out = self.router(x).argmax(1), x
        for number, expert in enumerate(self.experts):
            at = (to == number).nonzero()[:max(1, len(x) // 3), 0]
            out = out.index_add(0, at, expert(x[at]))
        return self.head(out)


def test_what_experts_of_limited_capacity_hold_inside_goes() -> None:
    torch.manual_seed(0)
    model, x = Mixture().double().eval(), torch.randn(9, 5).double()
    with pytest.warns(UserWarning, match="depends on which others are in its batch"):
        scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["experts.0.0", "experts.1.0"]
    small = fastscore.prune(model, scores, x, channels=0.5, compensate=False)
    with fastscore.mask(model, scores, small, x, compensate=False):
        assert torch.allclose(model(x), small.model(x))


class Branching(nn.Module):
    """Does something else in a batch of several, or many."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.a, self.b = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c, self.head, self.few = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 3), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self.pre(x).relu()))

    def way(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class AnotherLayer(Branching):
    def way(self, x: Tensor) -> Tensor:
        return (self.a if x.shape[0] <= 4 else self.b)(x).relu()


class AnotherOrder(Branching):
    def way(self, x: Tensor) -> Tensor:
        n, _ = x.size()
        made = [self.a(x).relu(), self.b(x).relu()]
        return self.c(torch.cat(made[::-1] if n > self.few else made, 1)).relu()


class AnotherView(Branching):
    def way(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if len(x) <= 4:
            return x
        return x.view(len(x), 2, -1).transpose(1, 2).flatten(1)


@pytest.mark.parametrize("kind", [AnotherLayer, AnotherOrder, AnotherView])
def test_what_is_another_way_in_a_batch_of_many_is_kept(kind: type[Branching]) -> None:
    """What remains is, in batches of each size, what it is where its channels are masked."""
    torch.manual_seed(0)
    model, x = kind().double().eval(), batch("rows", 6, 0)
    if kind is AnotherLayer:
        with pytest.raises(ValueError, match=f"a: {TOGETHER[:30]}"):
            fastscore.score(model, [x], progress=False)
        return
    scores = fastscore.score(model, [x], progress=False)
    assert "a" not in scores
    said = TOGETHER[:30] if kind is AnotherOrder else "x.view(len(x), 2, -1) in AnotherView.way"
    assert said in scores.skipped["a"]
    result = fastscore.prune(model, scores, x, channels=0.7, compensate=False)
    for samples in (1, 3, 6, 9):
        with torch.no_grad(), fastscore.mask(model, scores, result, x, compensate=False):
            torch.testing.assert_close(result.model(batch("rows", samples, 1)), model(batch("rows", samples, 1)))
