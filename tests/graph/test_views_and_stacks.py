"""Channels that views divide over several dimensions, or stacks add one to: branches that are weighed against each
other, split attention, channel shuffles."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import whole_way
from torch import Tensor, nn

from fastscore.graph.tracing import trace

WIDTH, PATHS = 6, 2
X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


class Net(nn.Module):
    """A stem, what a case puts in between, and a head."""

    def __init__(self, made: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(made, 5, 1), nn.Linear(5, 3)

    def between(self, x: Tensor) -> Tensor:
        """[N, 8, H, W] -> [N, made, H, W]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.between(self.stem(x).tanh()).tanh()).tanh()
        return self.head(y.mean((2, 3)))


class Kernels(Net):
    """Selective kernels: two branches, weighed channel by channel by a softmax over both."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.paths = WIDTH, PATHS
        self.convs = nn.ModuleList(nn.Conv2d(8, WIDTH, 3, padding=d, dilation=d) for d in range(1, 1 + PATHS))
        self.reduce, self.select = nn.Linear(WIDTH, 4), nn.Linear(4, PATHS * WIDTH)

    def weights(self, summed: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, paths, C, 1, 1]."""
        made = self.select(self.reduce(summed.mean((2, 3))).tanh())
        return made.view(len(made), self.paths, -1, 1, 1).softmax(1)

    def between(self, x: Tensor) -> Tensor:
        made = torch.stack([conv(x) for conv in self.convs], 1)
        return (made * self.weights(made.sum(1))).sum(1)


class OfKeptWidth(Kernels):
    """The width of the view is a number that the module keeps."""

    def weights(self, summed: Tensor) -> Tensor:
        made = self.select(self.reduce(summed.mean((2, 3))).tanh())
        return made.reshape(-1, self.paths, self.features, 1, 1).softmax(1)


class OfLastPaths(Kernels):
    """What is made for the branches lies side by side for each channel."""

    def weights(self, summed: Tensor) -> Tensor:
        made = self.select(self.reduce(summed.mean((2, 3))).tanh())
        return made.unflatten(1, (-1, self.paths)).softmax(2).transpose(1, 2)[..., None, None]


class Joined(Kernels):
    """A layer for each branch; branches are joined along a new dimension, and by a concatenation that is viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.select = nn.ModuleList(nn.Linear(4, WIDTH) for _ in range(PATHS))

    def between(self, x: Tensor) -> Tensor:
        made = torch.cat([conv(x).tanh() for conv in self.convs], 1)
        made = made.view(len(x), self.paths, self.features, *x.shape[2:])
        small = self.reduce(made.sum(1).mean((2, 3))).tanh()
        weights = torch.cat([select(small).unsqueeze(1) for select in self.select], 1).softmax(1)
        return (made * weights[..., None, None]).sum(1)


class Chunked(Kernels):
    """Weights are viewed, and taken apart branch by branch."""

    def between(self, x: Tensor) -> Tensor:
        made = [conv(x) for conv in self.convs]
        parts = self.weights(made[0] + made[1]).chunk(self.paths, 1)
        return sum(each * part.squeeze(1) for each, part in zip(made, parts, strict=True))


class SplitAttention(Net):
    """Of what one grouped convolution makes, as many parts as it has of each cardinal group are weighed."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.radix, self.groups = PATHS, groups
        self.conv = nn.Conv2d(8, PATHS * WIDTH, 3, padding=1, groups=PATHS * groups)
        self.fc1 = nn.Conv2d(WIDTH, 4, 1, groups=groups)
        self.fc2 = nn.Conv2d(4, PATHS * WIDTH, 1, groups=groups)

    def between(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh()
        n, whole = y.shape[:2]
        y = y.reshape(n, self.radix, whole // self.radix, *y.shape[2:])
        small = self.fc1(y.sum(1).mean((2, 3), keepdim=True)).tanh()
        weights = self.fc2(small).view(n, self.groups, self.radix, -1).transpose(1, 2).softmax(1).reshape(n, -1)
        return (y * weights.view(n, self.radix, whole // self.radix, 1, 1)).sum(1)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g goes to place i·groups + g."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffled(Net):
    """Grouped convolutions, and a shuffle between them."""

    def __init__(self, groups: int, other: int) -> None:
        super().__init__(12)
        self.groups = groups
        self.one, self.two = nn.Conv2d(8, 12, 1, groups=groups), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.three = nn.Conv2d(12, 12, 1, groups=other)

    def between(self, x: Tensor) -> Tensor:
        return self.three(self.two(shuffle(self.one(x).tanh(), self.groups)))


class ShuffledForTokens(Net):
    """A Linear reads what was shuffled, at places that come last: it copies them, and multiplies in two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.read = nn.Conv2d(8, 12, 1), nn.Linear(12, WIDTH)

    def between(self, x: Tensor) -> Tensor:
        return self.read(shuffle(self.one(x), 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("build", "made", "units"), [
    (Kernels, "convs.0", WIDTH), (OfKeptWidth, "convs.0", WIDTH), (OfLastPaths, "convs.0", WIDTH),
    (Joined, "convs.0", WIDTH), (Chunked, "convs.0", WIDTH), (lambda: SplitAttention(1), "conv", WIDTH),
    (lambda: SplitAttention(2), "conv", WIDTH // 2), (lambda: Shuffled(2, 1), "one", 6),
    (lambda: Shuffled(2, 2), "one", 3), (ShuffledForTokens, "one", 6)],
    ids=["view", "kept", "last", "joined", "chunked", "split", "split2", "shuffle", "shuffle2", "tokens"])
def test_whole_way(build: Callable[[], Net], made: str, units: int, tmp_path: Path) -> None:
    graph = trace(build().eval(), X.float())
    assert set(graph.skipped) == {"head"}, graph.skipped
    group = next(group for group in graph.groups if group.name == made)
    assert int(group.unit.max()) + 1 == units
    whole_way.check(build, X, [group.name for group in graph.groups], tmp_path)


class OfFixedWidth(Kernels):
    """The width of the view is a number in the code."""

    def weights(self, summed: Tensor) -> Tensor:
        made = self.select(self.reduce(summed.mean((2, 3))).tanh())
        return made.view(-1, PATHS, WIDTH, 1, 1).softmax(1)


class OverChannels(Kernels):
    """The softmax is over channels."""

    def weights(self, summed: Tensor) -> Tensor:
        return super().weights(summed).softmax(2)


@pytest.mark.parametrize(("build", "reason"), [
    (OfFixedWidth, "the model does not run with fewer channels there"),
    (OverChannels, "an operation runs over all its")])
def test_what_cannot_go_is_said(build: Callable[[], Net], reason: str) -> None:
    graph = trace(build().eval(), X.float())
    assert {group.name for group in graph.groups} == {"stem", "reduce", "last"}
    assert any(why.startswith(reason) for why in graph.skipped.values()), graph.skipped
