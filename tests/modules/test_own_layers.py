"""Layers of a user's own class that compute what a nn.Linear does lose channels as one does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from thinned import thinned
from torch import Tensor, nn
from whole_way import check, loads, noisy, scored_alike

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.weights.own_layers import OwnLayer, own_layer

Way = Callable[["Dense", Tensor], Tensor]


class Dense(nn.Module):
    """One that computes in one of many ways."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        transposed, self.way = way == "x @ w", way
        self.w = nn.Parameter(torch.randn(inputs, outputs) if transposed else torch.randn(outputs, inputs))
        self.register_parameter("b", None if way == "no bias" else nn.Parameter(torch.randn(outputs)))
        self.inputs, self.outputs, self.calls = inputs, outputs, 0

    def scale(self) -> int:
        """A number."""
        return 2

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return WAYS[self.way](self, x)


WAYS: dict[str, Way] = {
    "x @ w.t()": lambda layer, x: x @ layer.w.t() + layer.b,
    "x @ w": lambda layer, x: (x.reshape(-1, layer.inputs) @ layer.w + layer.b).view(*x.shape[:-1], layer.outputs),
    "linear": lambda layer, x: F.linear(x, layer.w, layer.b),
    "no bias": lambda layer, x: torch.matmul(x, layer.w.T),
    "einsum": lambda layer, x: torch.einsum("bti,oi->bto", x, layer.w) + layer.b}


def _x(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()


def _model(way: str) -> nn.Module:
    return nn.Sequential(Dense(5, 8, way), nn.Tanh(), Dense(8, 8, way), nn.Tanh(), Dense(8, 6, way), nn.Tanh(),
                         Dense(6, 3, way))


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str, tmp_path: Path) -> None:
    """By brute force, from data to a file: what loses channels is a nn.Linear."""
    model, x = noisy(lambda: _model(way)), _x(4, 5)
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        part = fastscore.prune(model, scores, x, channels=0.7, ignore=["0"]).model
    assert [type(layer) for layer in part[::2]] == [Dense, nn.Linear, nn.Linear, nn.Linear]
    result = check(lambda: _model(way), x, ["0", "2", "4"], tmp_path)
    assert {type(layer) for layer in result.model[::2]} == {nn.Linear}
    assert result.report.notes["layers"].startswith("0 and 3 like it was of a class of its own")
    assert "weights" not in result.report.notes
    assert result.report.macs[0] == 4 * (5 * 8 + 8 * 8 + 8 * 6 + 6 * 3)


@pytest.mark.parametrize(("options", "way"), thinned(
    [{}, {"repair": "linear"}, {"repair": "asymmetric"}, "means"], ["x @ w", "no bias"]))
def test_as_of_the_same_network_of_linears(way: str, options: object, tmp_path: Path) -> None:
    """Scored, masked, compensated, repaired and loaded."""
    model, x = noisy(lambda: _model(way)), _x(4, 5)
    plain = nn.Sequential(*(nn.Linear(*layer.w.shape[::1 if way == "x @ w" else -1], way != "no bias")
                            if isinstance(layer, Dense) else nn.Tanh() for layer in model)).double().eval()
    with torch.no_grad():
        for own, linear in zip(model[::2], plain[::2], strict=True):
            linear.weight.copy_(own.w.t() if way == "x @ w" else own.w)
            if own.b is not None:
                linear.bias.copy_(own.b)
    scored_alike(model, plain, x)
    scores = fastscore.score(plain, [x], progress=False)
    batches = [torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(n)).double() for n in range(6)]
    more = {"compensate": True} if options == "means" else {"calibration": batches, **dict(options)}
    small, expected = (fastscore.prune(each, scores, x, channels=0.6, **more).model for each in (model, plain))
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected(x), rtol=1e-6, atol=1e-8)
        with fastscore.mask(model, scores, 0.4, x), fastscore.mask(plain, scores, 0.4, x):
            torch.testing.assert_close(model(x), plain(x))
    loads(small, lambda: _model(way), x, tmp_path)


def test_a_scorer_and_an_optimizer() -> None:
    """Of a model that trains, and with what momentum there is."""
    model, x = noisy(lambda: _model("x @ w")).train(), _x(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with fastscore.Scorer(model, x) as scorer:
        scorer_output = model(x)
        scorer_output.square().mean().backward()
    optimizer.step()
    result = fastscore.prune(model, scorer.scores(), x, channels=0.5, scope="layer", ignore=["4"])
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    small = result.model
    assert {id(p) for group in rebuilt.param_groups for p in group["params"]} == set(map(id, small.parameters()))
    stays = torch.ones(8, dtype=torch.bool).index_fill(0, result.removed["0"], False)
    assert torch.equal(rebuilt.state[small[0].weight]["momentum_buffer"],
                       optimizer.state[model[0].w]["momentum_buffer"].t()[stays])


class Scaled(Dense):
    """Does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Clipped(Dense):
    """And here where values are large."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-100, 100)


class Rounded(Dense):
    """Of another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + (x - x.detach()) / 2)


class Other(Dense):
    """Of a part of what it has."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Noisy(Dense):
    """With noise while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


@pytest.mark.parametrize("kind", [Noisy, Scaled, Clipped, Rounded, Other])
def test_what_is_none(kind: type[Dense]) -> None:
    assert own_layer(Dense(4, 4, "linear")) == OwnLayer("w", "b", False)
    assert own_layer(Dense(4, 4, "x @ w")) == OwnLayer("w", "b", True)
    assert own_layer(kind(4, 4, "linear")) is None


class Tied(nn.Module):
    """Whose first layer's weight other code reads, and of which two others share one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Dense(5, 5, "linear") for _ in range(4))
        self.e, self.f = Dense(5, 6, "linear"), Dense(6, 2, "linear")
        self.c.w = self.d.w

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh() + self.a.w.mean(0)
        return self.f(self.e(self.d(self.c(x).tanh()).tanh()).tanh())


class Reading(nn.Module):
    """Whose code reads more of a layer than a nn.Linear has, or hands it more."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.c = how, Dense(5, 6, "linear"), Twice(6, 6, "linear"), nn.Linear(6, 7)
        self.d = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh() if self.how != "shape" else self.a(x).tanh() * self.a.w.shape[0]
        x = x * self.a.scale() if self.how == "method" else x
        x = self.b(x, True) if self.how == "argument" else self.b(x)
        return self.d(self.c(x.tanh()).tanh())


class Twice(Dense):
    """Takes one argument more."""

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return super().forward(x) * (1 + twice)


@pytest.mark.parametrize("how", ["shape", "method", "argument"])
def test_what_is_more_than_a_linear_stays(how: str) -> None:
    """And the rest of the model goes."""
    graph = trace(noisy(lambda: Reading(how)), _x(5))
    assert [group.name for group in graph.groups] == ["c"]
    assert graph.skipped["b" if how == "argument" else "a"] == (
        "b does not make what a nn.Linear would in every call" if how == "argument" else
        "a is of a class of its own (Dense), of which the model's code reads what a nn.Linear has not")


def test_what_others_read_stays() -> None:
    graph = trace(noisy(Tied), _x(5))
    assert [group.name for group in graph.groups] == ["e"]
    assert graph.skipped["a"] == "a reads a.w, which other code reads as well"
    assert graph.skipped["c"] == "c shares its w with another layer"
