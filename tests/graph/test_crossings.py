"""Channels of two layers along two dimensions of one tensor: linear attention, outer products, by brute force."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_contractions import OneHead, X
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

Product = Callable[[Tensor, Tensor], Tensor]
_CROSSED = "its channels lie along one dimension, and those of another layer along another, of what {0}Backward0 " \
    "makes of both: those of one are followed"
_SUMMED = "a product with other activations ({0}Backward0) sums over its channels, where nothing can be measured"


def _phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bnd,bne->bnde", _phi(k), v).cumsum(1)
    return torch.einsum("bnd,bnde->bne", _phi(q), state)


LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k, v: _phi(q) @ (_phi(k).mT @ v),
    "values first": lambda q, k, v: _phi(q) @ (v.mT @ _phi(k)).mT,
    "einsum": lambda q, k, v: torch.einsum("bnd,bde->bne", _phi(q), torch.einsum("bnd,bne->bde", _phi(k), v)),
    "softmax": lambda q, k, v: q.softmax(-1) @ (k.softmax(1).mT @ v),
    "causal": _causal}


@pytest.mark.parametrize("kind", list(LINEAR))
def test_values_of_linear_attention_go(kind: str, tmp_path: Path) -> None:
    check(lambda: OneHead(LINEAR[kind]), X, ["stem", "v"], tmp_path)


def test_keys_say_why_they_stay() -> None:
    kept = trace(noisy(lambda: OneHead(LINEAR["matmul"])), X).skipped
    assert (kept["k"], kept["q"]) == (_CROSSED.format("Bmm"), _SUMMED.format("Bmm"))


def test_scores_added_to_a_bias(tmp_path: Path) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.baddbmm(torch.zeros(1, 8, 8, dtype=q.dtype), q, k.mT, alpha=0.3)
        return torch.baddbmm(v, scores.softmax(-1), v)

    check(lambda: OneHead(attend), X, ["stem", "v"], tmp_path)
    assert trace(noisy(lambda: OneHead(attend)), X).skipped["k"] == _SUMMED.format("Baddbmm")


class Outer(nn.Module):
    """product: of what two layers make, [N, 5] and [N, 6], what a last one reads."""

    def __init__(self, product: Product, width: int) -> None:
        super().__init__()
        self.a, self.b, self.last, self.product = nn.Linear(24, 5), nn.Linear(24, 6), nn.Linear(width, 4), product

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(self.product(self.a(x).tanh(), self.b(x).tanh()))


OUTER: dict[str, tuple[Product, int, str, str]] = {  # and who goes, what the other meets
    "einsum": (lambda a, b: torch.einsum("bi,bj->bij", a, b).flatten(1), 30, "a", "Mul"),
    "broadcast": (lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), 30, "a", "Mul"),
    "bmm": (lambda a, b: torch.bmm(a[:, :, None], b[:, None]).flatten(1), 30, "a", "Bmm"),
    "summed": (lambda a, b: torch.einsum("bi,bj->bij", a, b).relu().mean(1), 6, "b", "Mul")}


@pytest.mark.parametrize("kind", list(OUTER))
def test_one_side_of_an_outer_product_goes(kind: str, tmp_path: Path) -> None:
    product, width, goes, operation = OUTER[kind]
    check(lambda: Outer(product, width), X, [goes], tmp_path)
    (stays,) = {"a", "b"} - {goes}
    assert trace(noisy(lambda: Outer(product, width)), X).skipped[stays] == _CROSSED.format(operation)


class Graph(nn.Module):
    """Attention over nodes, whose scores two layers of one output make."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.source, self.target = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 1)
        self.out, self.last = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.nodes(x.flatten(2).mT)
        h = F.leaky_relu(self.source(h) + self.target(h).mT).softmax(-1) @ h
        return self.last(self.out(F.elu(h)).relu().mean(1))


def test_rows_of_scores_are_no_channels(tmp_path: Path) -> None:
    check(Graph, X, ["nodes", "out"], tmp_path)


class Wide(nn.Module):
    """A factorisation machine beside a layer of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.factors, self.wide, self.deep = nn.Linear(3, 6), nn.Linear(24, 1), nn.Linear(48, 10)
        self.last = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        e = self.factors(x.flatten(2).mT)
        second = (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True) / 2
        return second + self.wide(x.flatten(1)) + self.last(self.deep(e.flatten(1)).relu())


def test_what_is_added_to_a_sum_over_channels_has_none_of_them() -> None:
    graph = trace(noisy(Wide), X)
    assert [group.name for group in graph.groups] == ["deep"]
    assert graph.skipped["wide"] == "its channels are the model's output"
    assert graph.skipped["factors"] == "an operation runs over all its channels (SumBackward1)"


class Pooled(nn.Module):
    """Tokens, weighted by one channel whose dimension is gone when it meets them."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.first = first
        self.body, self.score, self.weight, self.head = (
            nn.Linear(6, 12), nn.Linear(12, 7), nn.Linear(7, 1), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        weights = self.weight(self.score(h).tanh()).squeeze(-1).softmax(-1).unsqueeze(-1)
        return self.head((weights * h if self.first else h * weights).sum(1))


@pytest.mark.parametrize("first", [True, False])
def test_one_channel_whose_dimension_is_gone_leaves_those_that_it_meets(first: bool, tmp_path: Path) -> None:
    check(lambda: Pooled(first), torch.randn(2, 5, 6, dtype=torch.float64), ["body", "score"], tmp_path)


class PooledByVector(Pooled):
    """By a parameter that has no other dimension than that of the channels which it meets."""

    def __init__(self, first: bool) -> None:
        super().__init__(first)
        self.vector = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        weights = (self.score(h).tanh() @ self.vector).softmax(-1).unsqueeze(-1)
        return self.head((weights * h if self.first else h * weights).sum(1))


@pytest.mark.parametrize("first", [True, False])
def test_channels_that_end_at_a_vector_leave_those_that_what_comes_of_it_meets(first: bool, tmp_path: Path) -> None:
    check(lambda: PooledByVector(first), torch.randn(2, 5, 6, dtype=torch.float64), ["body"], tmp_path)


class Streams(nn.Module):
    """Several streams beside each other, from which layers read a weighted sum, and to which they give, by weights that
    are computed of all: hyper-connections, as DeepSeek V4 has them."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.embed, self.last, self.mixed = nn.Linear(3, 6), nn.Linear(6, 4), mixed
        self.weights = nn.ModuleList(nn.Linear(3 * 6, 3 + 3 + 9) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((6, 10), (10, 6)))

    def forward(self, x: Tensor) -> Tensor:
        streams = self.embed(x.flatten(2).mT).unsqueeze(2).expand(-1, -1, 3, -1)
        for weights, up, down in zip(self.weights, self.up, self.down, strict=True):
            before, after, mixing = weights(streams.flatten(2)).split([3, 3, 9], -1)
            y = down(up((before.sigmoid().unsqueeze(-1) * streams).sum(2)).relu())
            kept = mixing.unflatten(-1, (3, 3)).softmax(-1).mT @ streams if self.mixed else streams
            streams = after.sigmoid().unsqueeze(-1) * y.unsqueeze(-2) + kept
        return self.last(streams.sum(2).tanh())


@pytest.mark.parametrize("mixed", [True, False])
def test_channels_of_streams_go_whatever_weighs_them(mixed: bool, tmp_path: Path) -> None:
    check(lambda: Streams(mixed), X, ["embed", "up.0", "up.1"], tmp_path)
