"""Samples that meet in values alone: scores hold for the batches as they are given, and say so; others say nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from thinned import NIGHTLY, thinned
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double() * 2 ** torch.arange(4)[:, None]
TOLD = "depends on which others are in its batch"


class Net(nn.Module):
    """how: what is done between the first layer and the second."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(5, 8), nn.Linear(8 + (how == "deviation"), 6), nn.Linear(6, 2)
        self.norm, self.how = nn.BatchNorm1d(8), how

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.how == "scale":
            scale = x.detach().abs().max() / 7
            x = torch.tanh(x / scale) * scale
        if self.how == "mask":
            x = x * (x > x.mean())
        if self.how == "deviation":
            x = torch.cat([x, x.std(0, unbiased=False).mean().expand(len(x), 1)], 1)
        if self.how == "scale of a sample":
            scale = x.detach().abs().amax(1, keepdim=True) / 7
            x = torch.tanh(x / scale) * scale
        if self.how == "halves":
            x = torch.cat([half * (number + 1) for number, half in enumerate(x.chunk(2))])
        if self.how == "one of three":
            x = torch.cat([part * (2 if number == 1 else 1) for number, part in enumerate(x.chunk(3))])
        if self.how == "places":
            x = x * (1 + torch.arange(len(x))[:, None] / 10)
        if self.how == "norm":
            x = self.norm(x)
        if self.how == "noise":
            x = x + 0.5 * torch.randn_like(x)
        if self.how == "flipped":
            x = x.flip(0)
        if self.how == "never the same":
            self.calls = getattr(self, "calls", 0) + 1
            x = x * self.calls
        return self.h(F.relu(self.b(x)))


def made(how: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(how).double().eval()


@pytest.mark.parametrize("how", ["scale", "mask", "deviation", "halves", "one of three", "places"])
def test_scores_of_batches_as_they_are_given_say_so(how: str) -> None:
    model, v = made(how), torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    options: dict[str, Any] = {"gradient": "loss", "normalize": False, "progress": False}
    with pytest.warns(UserWarning, match=f"Net: .*{TOLD}"):
        whole = fastscore.score(model, [X], loss=lambda out, _: (out * v).sum(), **options)
    with pytest.warns(UserWarning, match=TOLD):
        fastscore.Scorer(model, X)
    rows = iter(v.split(2))
    with pytest.warns(UserWarning, match=TOLD):
        halves = fastscore.score(model, list(X.split(2)), loss=lambda out, _: (out * next(rows)).sum(), **options)
    assert not torch.allclose(whole["b"], halves["b"], rtol=1e-3)  # what is said is so
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{TOLD}")
        fastscore.score(model, list(X.split(1)), **{**options, "gradient": "random"})  # nobody else is there


def test_what_all_samples_share_is_left_as_it_is() -> None:
    """Three numbers beside four samples: as many as the samples that a model is tried on."""
    model = nn.ModuleDict({"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}).double()
    batch = {"x": X, "shift": torch.ones(3).double()}
    assert not trace(model, batch, forward=lambda model, batch:
                     model["b"](model["a"](batch["x"]).relu()) + batch["shift"]).samples.together


@pytest.mark.parametrize(("how", "samples"), thinned(
    ["", "scale of a sample", "norm", "noise", "flipped", "never the same"], [1, 2, 4]))
def test_nothing_is_said_of_samples_that_do_not_meet(how: str, samples: int) -> None:
    assert not trace(made(how), X[:samples]).samples.together
    assert not trace(made(how).float(), X[:1].float(), samples=X[:samples].float()).samples.together


class Chooses(nn.Module):
    """way: what is done with rows [N, T, 6] between the layers; tokens are embedded."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.pre, self.way = nn.Embedding(30, 5), nn.Linear(5, 6), way
        self.rank, self.router, self.head = nn.Linear(6, 1), nn.Linear(6, 2), nn.Linear(6, 3)
        self.mlp = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self, self.pre(x if x.is_floating_point() else self.embed(x))).mean(1))


def best_rows(net: Chooses, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    at = net.rank(rows)[:, 0].topk(len(rows) // 2).indices
    return rows.index_add(0, at, net.mlp(rows[at])).view_as(x)


def best_samples(net: Chooses, x: Tensor) -> Tensor:
    at = net.rank(x.mean(1))[:, 0].argsort()[:(len(x) + 1) // 2]
    return x.index_add(0, at, net.mlp(x[at]))


def capacity(net: Chooses, x: Tensor) -> Tensor:
    """Who comes first is served first."""
    rows = x.flatten(0, 1)
    to, out = net.router(rows).argmax(1), torch.zeros_like(rows)
    for number, expert in enumerate(net.experts):
        at = (to == number).nonzero()[:len(rows) * 5 // 8, 0]
        out = out.index_add(0, at, expert(rows[at]))
    return (rows + out).view_as(x)


def alike(net: Chooses, x: Tensor) -> Tensor:
    """A row like an earlier one of any sample is suppressed."""
    rows = x.flatten(0, 1)
    near = torch.cdist(rows.detach(), rows.detach()) < 1e-3
    return (rows + net.mlp(rows) * ~near.tril(-1).any(1, keepdim=True)).view_as(x)


def clusters(net: Chooses, x: Tensor) -> Tensor:
    rows = x.detach().flatten(0, 1)
    to = torch.cdist(rows, rows[-2:]).argmin(1)
    centres = torch.stack([rows[to == number].mean(0) for number in range(2)])
    return net.mlp(x + centres[to].view_as(x))


def counted(net: Chooses, x: Tensor) -> Tensor:
    return net.mlp(x) / (1 + int((net.rank(x) > 0).sum()))


def of_its_own(net: Chooses, x: Tensor) -> Tensor:
    at = net.rank(x)[..., 0].topk(x.shape[1] // 2, 1).indices
    return net.mlp(x.gather(1, at[..., None].expand(-1, -1, 6)))


def routed(net: Chooses, x: Tensor) -> Tensor:
    rows, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
    for number, expert in enumerate(net.experts):
        at = (net.router(rows).argmax(1) == number).nonzero()[:, 0]
        out = out.index_add(0, at, expert(rows[at]))
    return (rows + out).view_as(x)


def in_order(net: Chooses, x: Tensor) -> Tensor:
    order = net.rank(x.mean(1))[:, 0].argsort()
    return net.mlp(x[order])[order.argsort()]


def of_largest_first(net: Chooses, x: Tensor) -> Tensor:
    """In an order of its own, which the output has, too."""
    return net.mlp(x)[x.detach().mean((1, 2)).argsort()]


def chooses(way: Callable[..., Tensor], seed: int) -> Chooses:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Chooses(way).double().eval()


def drawn(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, 5, generator=generator, dtype=torch.float64) if kind == "floats" else \
        torch.randint(0, 30, (4, 4), generator=generator)


@pytest.mark.parametrize(("way", "kind"), thinned(
    [best_rows, best_samples, capacity, alike, clusters, counted], ["floats", "tokens"]))
def test_rows_that_compete_are_found_whatever_is_drawn(way: Callable[..., Tensor], kind: str) -> None:
    """Wherever a sample of the first batch is another by itself."""
    some = 0
    for seed in range(3 if NIGHTLY else 2):
        model, x = chooses(way, seed), drawn(kind, seed)
        with torch.no_grad():
            truly = not torch.allclose(model(x), torch.cat([model(one) for one in x.split(1)]))
        for example in (x, x[:1]):
            graph = trace(model, example, samples=x)
            assert graph.samples.together or not truly or not graph.groups
        some += truly
    assert some or (way, kind) == (alike, "floats")


@pytest.mark.parametrize(("way", "kind"), thinned(
    [of_its_own, routed, in_order, of_largest_first], ["floats", "tokens"]))
def test_rows_that_are_chosen_within_a_sample_are_no_companions(way: Callable[..., Tensor], kind: str) -> None:
    for seed in range(2):
        x = drawn(kind, seed)
        for example, samples in ((x, x), (x[:1], x)):
            assert not trace(chooses(way, seed), example, samples=samples).samples.together


def test_a_loop_that_began_with_one_sample_says_so_once_there_are_more() -> None:
    model, x = chooses(counted, 0), drawn("floats", 0)
    scorer = fastscore.Scorer(model, x[:1])
    with scorer:
        model(x[:1]).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scorer.scores()
        model(x).sum().backward()
    with pytest.warns(UserWarning, match=TOLD):
        scorer.scores()
    with pytest.warns(UserWarning, match=TOLD):
        fastscore.score(model, [x[:1], x], progress=False)
