"""Loops over heads in branches that no example runs: alike to those that run, they let heads go; else these stay."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")
X = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1)).double()


class Heads(nn.Module):
    """Heads with weights of their own, one after the other, as Zamba has them."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.last = nn.Linear(3, 12), nn.Linear(12, 6), nn.Linear(6, 4)
        self.num_heads, self.width, self.weight = 4, 3, nn.Parameter(torch.randn(4, 3, 3))
        self.register_buffer("table", torch.rand(4) + 0.5)

    def heads(self, x: Tensor) -> Tensor:
        h = self.into(x).reshape(*x.shape[:2], self.num_heads, self.width).permute(2, 0, 1, 3)
        return h @ self.weight[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(torch.cat(self.each(self.heads(x)), -1)).relu()).mean(1)

    def each(self, h: Tensor) -> list[Tensor]:
        made = []
        if self.other:
            for i in range(self.num_heads):
                made.append(h[i, :, :1].tanh() + h[i])
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


class Weighted(Heads):
    """By its number."""

    def each(self, h: Tensor) -> list[Tensor]:
        made = []
        if self.other:
            for i in range(self.num_heads):
                made.append(h[i] * (i + 1))
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


class OfATable(Heads):
    """By something that has one for each."""

    def each(self, h: Tensor) -> list[Tensor]:
        made = []
        if self.other:
            for i in range(self.num_heads):
                made.append(h[i] * self.table[i])
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


class OfATableComputed(Heads):
    """The same, which a variable holds."""

    def each(self, h: Tensor) -> list[Tensor]:
        made, table = [], self.table.exp()
        if self.other:
            for i in range(self.num_heads):
                made.append(h[i] * table[i])
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


class OneAfterAnother(Heads):
    """With half of what the one before has given."""

    def each(self, h: Tensor) -> list[Tensor]:
        made = []
        if self.other:
            last = torch.zeros_like(h[0])
            for i in range(self.num_heads):
                now = h[i] + last / 2
                made.append(now)
                last = now
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


class Along(Heads):
    """Along another dimension than the one that runs."""

    def each(self, h: Tensor) -> list[Tensor]:
        made = []
        if self.other:
            h = h.transpose(0, 1)
            for i in range(self.num_heads):
                made.append(h[:, i].tanh())
        else:
            for i in range(self.num_heads):
                made.append(h[i].tanh())
        return made


def test_heads_go_through_a_loop_like_the_one_that_runs() -> None:
    model: Any = noisy(Heads)
    scores = fastscore.score(model, [X], progress=False)
    assert "into" in scores
    small: Any = fastscore.prune(model, scores, X, channels=0.5, scope="layer", compensate=False).model
    assert small.num_heads == 2
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, scope="layer", compensate=False):
        for other in (False, True):
            model.other = small.other = other
            torch.testing.assert_close(small(X), model(X), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [Weighted, OfATable, OfATableComputed, OneAfterAnother, Along])
def test_heads_stay_where_it_does_something_else(kind: type[Heads]) -> None:
    skipped = trace(noisy(kind), X).skipped
    assert f"{kind.__name__}.each" in skipped["into"]
