"""Branches that no example runs and that mean something else than channels, or that constructors have ruled out: the
channels go, and what is left computes the same in them."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_unrun import Net, X
from test_unrun_heads import Attention
from torch import Tensor, nn
from whole_way import noisy

import fastscore

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")


class Chosen(Net):
    """What a constructor chose is not what another call chooses."""

    kind: Any = nn.ReLU

    def between(self, h: Tensor) -> Tensor:
        if self.kind is nn.Softmax:
            return h.softmax(1)
        if self.kind not in (nn.ReLU, nn.GELU):
            h = h - h.mean(1, keepdim=True)
        return h


class Flagged(Net):
    """A flag that the constructor set, by itself and beside an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = False

    def between(self, h: Tensor) -> Tensor:
        h = h - h.mean(1, keepdim=True) if self.shared else h
        return h.softmax(1) if getattr(self, "shared", True) and len(h) > 7 else h


class Configured(Net):
    """A flag of what the constructor kept."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(shared=False)

    def between(self, h: Tensor) -> Tensor:
        if self.config.shared:
            h = h - h.mean(1, keepdim=True)
        return h


class Share(Net):
    """A number that counts nothing, which the constructor set."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.0

    def between(self, h: Tensor) -> Tensor:
        if self.share > 0.0:
            h = F.relu(h - h.mean(1, keepdim=True) - self.share * h.std(1, keepdim=True))
        return h


class Both(Net):
    """Layers that the constructor made, which no call takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.one: nn.Module | None = nn.ReLU()
        self.two: nn.Module | None = nn.Tanh()

    def between(self, h: Tensor) -> Tensor:
        if self.one is not None and self.two is not None:
            h = self.one(h) + self.two(h)
        else:
            h = torch.cat([h[:, 8:], h[:, :8]], 1)
        return h.flip(1) if self.one is None or self.two is None else h


class SummedWithOwn(Net):
    """With the parameter that reads them anyway, in another sum of products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.other:
            return torch.einsum("nc,dc->nd", 2 * h.mean((2, 3)), self.weight)
        return torch.einsum("nchw,dc->nd", h, self.weight)


class OfRows(Net):
    """Dimensions that rows do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.mean((1, 2)) if x.dim() > 2 else x).relu()
        return self.second(h.mean((2, 3)) if h.dim() > 2 else h)


class Positions(Net):
    """Of places."""

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, c, height, width = h.shape
            h = h.flip(2).roll(1, 3).view(n, c, height // 2, 2, width).mean(3, keepdim=True).repeat(1, 1, 1, 2, 1)
            h = h.flatten(2, 3)
            h = (h[:, :, :2].mean(2, keepdim=True) + h[..., 1:2] + h.softmax(-1)).reshape(n, -1, height, width)
        return h + 0


class SomethingElse(Net):
    """A variable of that name holds channels elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.other:
            h = h + 1
        h = self.second(h)
        if self.other:
            h = h.flip(1)
        return h.mean((2, 3))


class Thirds(Attention):
    """Queries, keys and values, all heads of each; and channels of each head."""

    def taken(self, x: Tensor) -> Tensor:
        if self.other:
            x = torch.cat([2 * part for part in x.chunk(3, -1)], -1)
        return x

    def between(self, h: Tensor) -> Tensor:
        return torch.cat([-h[..., 2:], h[..., :2]], -1) if self.other else h


class Averaged(Net):
    """Over places, before the branch: the variable holds channels there, behind it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu().flatten(2).mT
        h = h.mean(1)
        y = self.second(h[..., None, None]).flatten(1)
        return 2 * y if self.other else y


class SameLayer(Net):
    """The layer that reads them is called, with or without one that holds nothing before it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.unused = nn.Dropout(0.1), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.other:
            return self.second(self.before(h * h.mean((2, 3), keepdim=True))).mean((2, 3))
        return self.second(h).mean((2, 3))


@pytest.mark.parametrize("kind", [Positions, SomethingElse, Thirds, SameLayer, Chosen, Flagged, Configured, Share, Both,
                                  SummedWithOwn, OfRows, Averaged])
def test_what_means_something_else_does_not(kind: type[Net]) -> None:
    model: Any = noisy(kind)
    scores = fastscore.score(model, [X], progress=False)
    assert ("qkv" if kind is Thirds else "first") in scores
    small = fastscore.prune(model, scores, X, channels=0.5, compensate=False).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, compensate=False):
        for other in (False, True):
            model.other = small.other = other
            torch.testing.assert_close(small(X), model(X), rtol=1e-8, atol=1e-9)
