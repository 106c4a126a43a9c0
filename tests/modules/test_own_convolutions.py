"""Layers of a user's own class that compute what a convolution of PyTorch does lose channels as one does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, loads, noisy, scored_alike

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.weights.own_layers import OwnLayer, own_layer

Way = Callable[["Conv", Tensor], Tensor]


class Conv(nn.Module):
    """One that computes in one of many ways."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        kernel = (3,) if "1d" in way else (3, 3, 3) if "3d" in way else (3, 3)
        widths = (inputs, outputs) if "transpose" in way else (outputs, inputs)
        self.w, self.way, self.pad = nn.Parameter(torch.randn(*widths, *kernel) / 4), way, 1
        self.register_parameter("b", None if way == "no bias" else nn.Parameter(torch.randn(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self, x)


WAYS: dict[str, Way] = {
    "conv1d": lambda layer, x: F.conv1d(x, layer.w, layer.b),
    "conv2d": lambda layer, x: F.conv2d(x, layer.w, layer.b, padding=layer.pad),
    "conv3d": lambda layer, x: F.conv3d(x, layer.w, layer.b, padding="same"),
    "no bias": lambda layer, x: F.conv2d(x, layer.w, stride=(2, 1), padding=[layer.pad, layer.pad]),
    "added": lambda layer, x: torch.conv2d(x, layer.w, None, 1, 2, 2) + layer.b.view(-1, 1, 1),
    "conv_transpose1d": lambda layer, x: F.conv_transpose1d(x, layer.w, layer.b, 2),
    "conv_transpose2d": lambda layer, x: F.conv_transpose2d(x, layer.w, layer.b, 2, 1, 1)}


def _x(way: str) -> Tensor:
    sizes = {"conv1d": (9,), "conv_transpose1d": (3,), "conv3d": (3, 4, 3)}.get(way, (6, 5))
    return torch.randn(3, 3, *sizes, generator=torch.Generator().manual_seed(1)).double()


def _model(way: str) -> nn.Module:
    return nn.Sequential(Conv(3, 6, way), nn.Tanh(), Conv(6, 5, way), nn.Tanh(), Conv(5, 2, way))


def _plain(way: str) -> nn.Module:
    """The same network of PyTorch's layers."""
    made = []
    for layer in _model(way):
        kind = own_layer(layer)
        made.append(layer if kind is None else kind.made(layer.w, kind.bias is not None))
    return nn.Sequential(*made)


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str, tmp_path: Path) -> None:
    """By brute force, from data to a file: what loses channels is PyTorch's layer."""
    result = check(lambda: _model(way), _x(way), ["0", "2"], tmp_path)
    assert {type(layer) for layer in result.model[::2]} == {own_layer(Conv(1, 1, way)).kind}
    assert result.report.notes["layers"].startswith("0 and 2 like it was of a class of its own")


@pytest.mark.parametrize("way", ["conv2d", "added", "conv_transpose2d"])
def test_as_of_the_same_network_of_convolutions(way: str, tmp_path: Path) -> None:
    """Scored, counted, compensated, repaired and loaded."""
    model, x = noisy(lambda: _model(way)), _x(way)
    plain = _plain(way).to_empty(device="cpu").double().eval()
    with torch.no_grad():
        for own, layer in zip(model[::2], plain[::2], strict=True):
            layer.weight.copy_(own.w)
            layer.bias.copy_(own.b)
    scored_alike(model, plain, x)
    scores = fastscore.score(plain, [x], progress=False)
    batches = [torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(n)).double() for n in range(4)]
    for more in ({"compensate": True}, {"calibration": batches, "repair": "linear"}):
        small, expected = (fastscore.prune(each, scores, x, channels=0.6, **more) for each in (model, plain))
        assert small.report.macs == expected.report.macs
        with torch.no_grad():
            torch.testing.assert_close(small.model(x), expected.model(x), rtol=1e-6, atol=1e-8)
    loads(small.model, lambda: _model(way), x, tmp_path)


class Grouped(nn.Module):
    """Of a weight that does not say how wide its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.groups = nn.Parameter(torch.randn(6, 2, 3, 3)), 3

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, groups=self.groups)


class Scaled(Conv):
    """Does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ByItsSize(Conv):
    """Pads by the size of what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=x.shape[-1] % 2)


class Added(nn.Module):
    """No convolution: as large as images are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_which_they_are() -> None:
    assert own_layer(Grouped()) == OwnLayer("weight", None, kind=nn.Conv2d, settings=(("groups", 3),))
    assert own_layer(Conv(4, 4, "conv2d")) == OwnLayer("w", "b", kind=nn.Conv2d, settings=(("padding", 1),))
    for other in (Scaled(4, 4, "conv2d"), ByItsSize(4, 4, "conv2d"), Added()):
        assert own_layer(other) is None


class Shared(nn.Module):
    """Whose first layer's weight other code reads, and of whose second it reads a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Conv(3, 3, "conv2d") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh() + self.a.w.mean() + self.b.pad)


def test_what_other_code_reads_stays() -> None:
    graph = trace(noisy(Shared), _x("conv2d"))
    assert [group.name for group in graph.groups] == ["b"]
    assert graph.skipped["a"] == "a reads a.w, which other code reads as well"


class Depthwise(Conv):
    """Whose groups are as many as there are channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, groups=x.shape[1])


def test_a_convolution_that_stays_is_said_to_be_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Depthwise(1, 6, "conv2d"), nn.Conv2d(6, 2, 1))
    reasons = trace(model.double().eval(), _x("conv2d")).skipped
    assert reasons["1"] == "1 does not make what a nn.Conv2d would in every call"


class Dropped(Conv):
    """With dropout on what it reads, which PyTorch's layer has not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.dropout(x, 0.5, self.training), self.w, self.b)


def test_what_it_does_in_training_alone_is_not_lost() -> None:
    assert own_layer(Dropped(3, 6, "conv2d")) is None
