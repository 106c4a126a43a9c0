"""Branches that no example runs: where they mean heads, these stay, and the reason quotes them."""

import linecache
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy

from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Of four heads, 4 wide. other: whether a branch is taken."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(4, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).flatten(2).mT
        n, t, _ = x.shape
        q, k, v = self.taken(self.qkv(x)).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = self.between(F.scaled_dot_product_attention(q, k, v))
        return self.proj(h.transpose(1, 2).reshape(n, t, -1)).mean(1)

    def between(self, h: Tensor) -> Tensor:
        return h

    def taken(self, x: Tensor) -> Tensor:
        return x


class HeadSlice(Attention):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :2], h[:, 2:]], 1) if self.other else h


class HeadMean(Attention):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h + h.mean(1, keepdim=True)
        return h


class HeadView(Attention):
    def taken(self, x: Tensor) -> Tensor:
        if self.other:
            x = x.view(2, 36, 3, 4, -1).flip(3).flatten(2)
        return x


STAY: dict[type[Attention], str] = {
    HeadSlice: "h[:, :2]", HeadMean: "h.mean(1, keepdim=True)", HeadView: "x.view(2, 36, 3, 4, -1)"}


@pytest.mark.parametrize("kind", STAY)
def test_what_means_heads_keeps_them(kind: type[Attention]) -> None:
    said = trace(noisy(kind), X).skipped["qkv"]
    assert said.startswith(f"{STAY[kind]} in {kind.__name__}")
    line = int(re.search(r"\(line (\d+) of test_unrun_heads.py\), which example_inputs do not", said)[1])
    assert STAY[kind] in linecache.getline(__file__, line)


class Doubled(Attention):
    """What it averages over heads adds nothing."""

    def between(self, h: Tensor) -> Tensor:
        return h + 0 * h.mean(1, keepdim=True) if self.other else h


class Averaged(Doubled):
    def between(self, h: Tensor) -> Tensor:
        return h + h.mean(1, keepdim=True) if self.other else h


@pytest.mark.parametrize("kind", [Doubled, Averaged])
def test_a_forward_that_calls_both_ways_shows_whether_channels_can_go(kind: type[Attention]) -> None:
    """As the reason says."""
    def both(model: Any, x: Tensor) -> Tensor:
        outputs = []
        for model.other in (True, False):
            outputs.append(model(x))
        return torch.cat(outputs, 1)

    model: Any = noisy(kind)
    assert "a forward= that calls the model that way, too, shows" in trace(model, X).skipped["qkv"]
    found = trace(model, X, both)
    assert ("qkv" in found.skipped) == (kind is Averaged)
    assert "example_inputs" not in found.skipped.get("qkv", "")
