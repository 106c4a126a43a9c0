"""Layers whose own code runs a normalisation and an activation, which they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stream_networks import LayerNorm2d
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(3, 3, 7, 7, generator=torch.Generator().manual_seed(0)).double()


class Conv2d(nn.Conv2d):
    """As detectron2's."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class Frozen(nn.Module):
    """A BatchNorm of buffers, as detectron2's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + 1e-5).rsqrt()
        bias = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class Separable(nn.Conv2d):
    """A depthwise convolution that holds the next one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, inputs, 3, groups=inputs)
        self.pointwise, self.norm = nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.pointwise(super().forward(x))))


class Residual(nn.Conv2d):
    """Adds what it reads to what it makes of it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


class Squeezed(nn.Conv2d):
    """Holds the layers of its gate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.squeeze, self.excite = nn.Conv2d(self.out_channels, 4, 1), nn.Conv2d(4, self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Linear(nn.Linear):
    """The same of features, or tokens."""

    def __init__(self, inputs: int, outputs: int, norm: nn.Module, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


class Embedding(nn.Embedding):
    """The same of tokens that are looked up."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(20, 8)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Tokens(nn.Module):
    """Of a network for features one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Linear(3, 8, nn.LayerNorm(8)), Linear(8, 8, nn.LayerNorm(8), False), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(2).mT).mean(1)


NORMS: dict[str, tuple[Callable[[int], nn.Module], Any]] = {
    "BatchNorm": (nn.BatchNorm2d, F.relu), "in place": (nn.BatchNorm2d, nn.ReLU(inplace=True)),
    "frozen": (Frozen, None), "GroupNorm": (lambda channels: nn.GroupNorm(2, channels), nn.SiLU()),
    "LayerNorm": (LayerNorm2d, nn.GELU())}


@pytest.mark.parametrize("kind", list(NORMS))
def test_channels_go_with_the_norms_inside(kind: str, tmp_path: Path) -> None:
    norm, activation = NORMS[kind]
    check(lambda: nn.Sequential(Conv2d(3, 8, 3, norm=norm(8), activation=activation),
                                Conv2d(8, 8, 3, norm=norm(8), bias=False), nn.Conv2d(8, 4, 1)), X, ["0", "1"], tmp_path)


def test_linears_with_norms_inside(tmp_path: Path) -> None:
    check(lambda: nn.Sequential(Linear(3, 8, nn.BatchNorm1d(8)), Linear(8, 8, nn.BatchNorm1d(8), False),
                                nn.Linear(8, 4)), X[:, :, 0, 0], ["0", "1"], tmp_path)
    check(Tokens, X, ["net.0", "net.1"], tmp_path)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_embeddings_with_norms_inside(norm: type[nn.LayerNorm | nn.RMSNorm], gain: bool, tmp_path: Path) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = Embedding(norm(8, 1e-5, gain)), nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(x + self.inner(x).tanh()).mean(1)

    check(Stream, torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0)), ["embed"], tmp_path)


def test_a_depthwise_convolution_that_holds_the_next(tmp_path: Path) -> None:
    check(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Separable(8, 6), nn.Conv2d(6, 4, 1)), X, ["0", "1.pointwise"],
          tmp_path)


def test_defaults_leave_such_biases() -> None:
    model = noisy(lambda: nn.Sequential(*(Conv2d(size, 8, 3, norm=nn.BatchNorm2d(8), activation=F.relu)
                                          for size in (3, 8)), nn.Conv2d(8, 4, 1)))
    scores = fastscore.score(model, [X], progress=False)
    result = fastscore.prune(model, scores, X, channels=0.6)
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, X):
        torch.testing.assert_close(result.model(X), model(X))
    assert "does more with a bias than add it" in result.report.notes["biases"]


def test_a_layer_that_adds_what_it_reads_is_no_place_to_measure() -> None:
    """A gradient there counts what comes by the sum, too, which whoever reads the sum counts."""
    graph = trace(noisy(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3),
                                              nn.Conv2d(6, 4, 1))), X)
    assert [group.name for group in graph.groups] == ["2"]
    assert graph.skipped["0"] == "the code of 1 (Residual) does more with what it reads than multiply it by its weight"


def test_layers_inside_of_a_layer_are_named() -> None:
    graph = trace(noisy(lambda: nn.Sequential(Squeezed(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1))), X)
    assert [group.name for group in graph.groups] == ["1"]
    assert graph.skipped["0"] == "0.squeeze runs inside of 0 (Squeezed), which is followed as one layer"
