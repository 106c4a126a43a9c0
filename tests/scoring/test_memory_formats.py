"""Models whose code depends on where numbers lie in memory: a view, complex numbers, strides that are read."""

from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn
from torch.nn import functional as F
from whole_way import noisy, sums

import fastscore
from fastscore.graph.tracing import trace
from fastscore.scoring.engine import score

X = torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(6 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.between(self.first(x)).relu())).relu().flatten(1))

    def between(self, x: Tensor) -> Tensor:
        return x


class Viewed(Net):
    """As in LeNet, and in much that was written before flatten()."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.second(self.first(x).relu())).relu()
        return self.last(y.view(y.size(0), -1))


class Joined(Net):
    """As in attention by groups: channels beside samples, which a view can join where there is one sample alone."""

    def between(self, x: Tensor) -> Tensor:
        y = x.view(len(x) * 2, -1, *x.shape[2:])
        return (y * y.mean((2, 3), keepdim=True).sigmoid()).view(x.shape)


class Images(Net):
    """Of the images that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x.view(len(x), -1) * 2).view(x.shape))


class Strides(Net):
    """Reads memory as it expects it: no exception says that it is otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.as_strided(x, x.shape, (108, 36, 6, 1)))


class Filter(Net):
    """GFNet's, of complex numbers in a parameter of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 6, 4, 2))

    def between(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.filter), s=x.shape[-2:])


class Weight(Net):
    """A layer of its own, with a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Scaled(8, 6, 3)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(len(self.weight), -1).mul(0.5).view_as(self.weight), self.bias, padding=1)


@pytest.mark.parametrize(("kind", "format"), [
    (Net, torch.channels_last),
    *((kind, torch.contiguous_format) for kind in (Viewed, Joined, Images, Strides, Filter, Weight))])
def test_scores_and_repairs_are_right(kind: type[Net], format: torch.memory_format) -> None:
    """By brute force; and the network that a repair gives its weights runs as the dense one does."""
    model = noisy(kind).to(memory_format=format)
    with untouched(model), torch.no_grad():
        v = torch.randn(model(X).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with untouched(model):
        groups = trace(model, X).groups
        scores = fastscore.score(model, [X], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, batch: (output * v).sum())
    assert "second" in scores
    for group in groups:
        torch.testing.assert_close(scores[group.name].double(), sums(model, group, X, v).square().mean(0), rtol=1e-6,
                                   atol=1e-12)
    options: dict[str, Any] = {"channels": 0.6, "calibration": [X, X + 1, X - 1, 2 * X], "progress": False}
    with untouched(model):
        small = fastscore.prune(model, scores, X, **options, repair="linear").model
    assert small(X).shape == (3, 3)
    assert small.second.weight.is_contiguous(memory_format=format)


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_a_first_batch_of_one_sample_says_nothing_of_the_next(forward: Any) -> None:
    """A view can join channels with one sample, and not with two."""
    model, options = noisy(Joined), {"progress": False} if forward is None else {"progress": False, "forward": forward}
    with untouched(model):
        scores = fastscore.score(model, [X[:1], X[1:]], **options)
    for name, expected in fastscore.score(model, [X], **options).items():
        torch.testing.assert_close(scores[name], expected)


def test_only_what_cannot_be_otherwise_is_slower() -> None:
    """Convolutions keep the format that is fast where the model's code takes it."""
    plans = {kind: score(noisy(kind), [X], progress=False).plan for kind in (Net, Viewed, Filter)}
    assert {kind: plan.layout for kind, plan in plans.items()} == {
        Net: "channels_last", Viewed: "contiguous", Filter: "channels_last"}
    assert plans[Viewed].folded == plans[Net].folded != {}
