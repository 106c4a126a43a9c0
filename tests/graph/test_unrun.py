"""Branches that no example runs: where they mean channels that a variable holds there, the group stays, and the reason
quotes them."""

import linecache
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy

from fastscore.graph.tracing import trace

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Images -> 4 numbers. other: whether a branch is taken."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).relu())).mean((2, 3))

    def between(self, h: Tensor) -> Tensor:
        return h


class View(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, _, height, width = h.shape
            h = h.view(n, 4, 4, height, width).flip(2).flatten(1, 2)
        return h


class Shuffle(Net):
    def between(self, h: Tensor) -> Tensor:
        if not self.other:
            return h
        n, _, height, width = h.shape
        return h.view(n, 2, -1, height, width).transpose(1, 2).flatten(1, 2)


class Kept(Net):
    """What is None until a call keeps something."""

    kept: Tensor | None = None

    def between(self, h: Tensor) -> Tensor:
        return h if self.kept is None else h.flip(1)


class Neighbours(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            n, _, height, width = h.shape
            h = h.reshape((n, -1, 4, height, width)).flip(2).flatten(1, 2)
        return h


class Chunk(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            one, two = h.chunk(2, 1)
            h = torch.cat([2 * one, two], 1)
        return h


class Split(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            one, two = torch.split(h, [4, 12], dim=1)
            h = torch.cat([2 * one, two], 1)
        return h


class SplitAlike(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other: h = torch.cat([i * part for i, part in enumerate(h.split(4, 1))], 1)  # noqa: E701
        return h


class Unflatten(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (4, -1)).cumsum(1).flatten(1, 2) if self.other else h


class Slice(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :4], h[:, 4:]], 1) if self.other else h


class Half(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            half = h.shape[1] // 2
            if len(h) > 1:
                h = torch.cat([2 * h[:, :half], h[:, half:]], 1)
        return h


class Last(Net):
    def between(self, h: Tensor) -> Tensor:
        return h * h[..., -1, None, None, None] if self.other and h.dim() == 1 else h * h[:, -1:] if self.other else h


class Mean(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h * h.mean(1, keepdim=True)
        return h


class Total(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h / (1 + h.sum(dim=1, keepdim=True))
        return h


class Before(Net):
    """What is computed before the branch, and means nothing without it."""

    def between(self, h: Tensor) -> Tensor:
        size = h.detach().norm(dim=1, keepdim=True)
        inverse = 1e4 / size
        if self.other or (size > 1e4).any():
            h = h * inverse.clamp(max=1)
        return h


class BeforeByMethod(Net):
    """The same, by a method."""

    def middle(self, h: Tensor) -> Tensor:
        return h.mean(1, keepdim=True)

    def between(self, h: Tensor) -> Tensor:
        middle = self.middle(h)
        h = 2 * h
        return h - middle if self.other else h


class Softmax(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = F.softmax(h, dim=-3)
        return h


class Roll(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = torch.roll(h, 1, 1)
        return h


class Scaled(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h * h.shape[1] ** -0.5
        return h


class SecondHead(Net):
    """Of a layer that the example does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.aux(h.mean((2, 3))) if self.other else self.second(h).mean((2, 3))


class Scale(Net):
    """Of a parameter that the example does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def between(self, h: Tensor) -> Tensor:
        return h * self.scale.view(1, -1, 1, 1) if self.other else h


class Renamed(Net):
    """By another name, in another order."""

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            y = h.permute(0, 2, 3, 1)
            h = h * y.softmax(-1).permute(0, 3, 1, 2)
        return h


def averaged(x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True)


class ByFunction(Net):
    def between(self, h: Tensor) -> Tensor:
        return averaged(h) if self.other else h


class ByMethods(Net):
    def outer(self, z: Tensor) -> Tensor:
        return self.inner(2 * z)

    def inner(self, x: Tensor) -> Tensor:
        return torch.cat([2 * x[:, :4], x[:, 4:]], 1)

    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = self.outer(h)
        return h


class Loop(Net):
    def between(self, h: Tensor) -> Tensor:
        if self.other:
            h = h + sum(h[:, i:i + 1] for i in range(3))
        return h


class ByAttribute(Net):
    width = 8

    def between(self, h: Tensor) -> Tensor:
        return torch.cat([2 * h[:, :self.width], h[:, self.width:]], 1) if self.other else h


class OfAll(Net):
    def between(self, h: Tensor) -> Tensor:
        return h / h.std() if self.other else h


class Normalized(Net):
    def between(self, h: Tensor) -> Tensor:
        return F.normalize(h) if self.other else h


class Einsum(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.einsum("nchw,ndhw->nchw", h, h) if self.other else h


class Counted(Net):
    """A number that the constructor set, which counts channels."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True) if self.width < 12.0 else h


class Everything(Net):
    """Over all dimensions."""

    def between(self, h: Tensor) -> Tensor:
        return h / h.sum() if self.other else h


class EinsumWithOwn(Net):
    """With a parameter that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(16, 16))

    def between(self, h: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", h, self.mixing) if self.other else h


STAY: dict[type[Net], str] = {
    Kept: "h.flip(1)",
    View: "h.view(n, 4, 4, height, width)", Shuffle: "h.view(n, 2, -1, height, width)",
    Neighbours: "h.reshape((n, -1, 4, height, width))", Chunk: "h.chunk(2, 1)", Split: "torch.split(h, [4, 12], dim=1)",
    SplitAlike: "h.split(4, 1)", Unflatten: "h.unflatten(1, (4, -1))", Slice: "h[:, :4]", Half: "h[:, :half]",
    Last: "h[:, -1:]", Mean: "h.mean(1, keepdim=True)", Total: "h.sum(dim=1, keepdim=True)",
    Everything: "h.sum()",
    Softmax: "F.softmax(h, dim=-3)", Roll: "torch.roll(h, 1, 1)",
    Scaled: "h.shape[1] ** (-0.5)", SecondHead: "self.aux(h.mean((2, 3)))",
    Scale: "h * self.scale.view(1, -1, 1, 1)", Renamed: "y.softmax(-1)", ByAttribute: "h[:, :self.width]",
    Loop: "h[:, i:i + 1]", OfAll: "h.std()", Normalized: "F.normalize(h)",
    Einsum: "torch.einsum('nchw,ndhw->nchw', h, h)", Counted: "h.mean(1, keepdim=True)",
    EinsumWithOwn: "torch.einsum('nchw,dc->ndhw', h, self.mixing)",
    ByFunction: "x.mean(1, keepdim=True)", ByMethods: "x[:, :4]"}


@pytest.mark.parametrize("kind", STAY)
def test_what_means_channels_keeps_them(kind: type[Net]) -> None:
    said = trace(noisy(kind), X).skipped["first"]
    assert said.startswith(f"{STAY[kind]} in {'averaged' if kind is ByFunction else kind.__name__}")
    line = int(re.search(r"\(line (\d+) of test_unrun.py\), which example_inputs do not", said)[1])
    assert re.sub("[() ]", "", STAY[kind]) in re.sub("[() ]", "", linecache.getline(__file__, line).replace('"', "'"))


def test_a_statistic_that_a_branch_reads_keeps_them() -> None:
    said = trace(noisy(Before), X).skipped["first"]
    assert said.startswith("h.detach().norm(dim=1, keepdim=True), which Before.between (line ")
    line = int(re.search(r"\(line (\d+) of test_unrun.py\) reads where example_inputs do not", said)[1])
    assert "inverse.clamp" in linecache.getline(__file__, line)


def test_so_does_one_that_a_method_computes() -> None:
    said = trace(noisy(BeforeByMethod), X).skipped["first"]
    assert said.startswith("h.mean(1, keepdim=True), which BeforeByMethod.between (line ")
