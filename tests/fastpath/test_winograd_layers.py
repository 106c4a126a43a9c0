"""Convolutions with a quarter of the products: which take it, both directions, and how much they round."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastscore
from fastscore.fastpath import packed_layers, winograd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ways(module: nn.Conv2d, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far the layer is off in both directions, by the root of the mean square, of that of what it makes."""
    given = x.double().requires_grad_()
    y = copy.deepcopy(module).double()(given)
    g = random(*y.shape, seed=7)
    (back,) = torch.autograd.grad(y, given, g.double())
    pairs = ((layer.forward(x), y.detach()), (layer.backward(g, x.shape), back))
    return tuple((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
                 for found, wanted in pairs)  # type: ignore[return-value]


@settings(max_examples=30, deadline=None)
@given(inputs=st.integers(1, 40), outputs=st.integers(1, 40), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
       size=st.tuples(st.integers(5, 17), st.integers(5, 17)), last=st.booleans(), bias=st.booleans())
def test_both_ways(inputs: int, outputs: int, padding: tuple[int, int], size: tuple[int, int], last: bool,
                   bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(inputs, outputs, 3, padding=padding, bias=bias)
    x = random(2, inputs, *size)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    with torch.no_grad():
        layer = winograd.Convolution(module)
    with torch.enable_grad():
        assert max(both_ways(module, layer, x)) < 5e-6


@pytest.mark.parametrize("channels", [64, 256])
def test_rounds_at_most_three_times_as_much_as_the_layer_with_all_products(channels: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(channels, channels, 3, padding=1)
    x = random(2, channels, 14, 14).relu()
    with torch.no_grad():
        quarter, whole = winograd.Convolution(module), packed_layers.Convolution(module, (14, 14))
    for fewer, all_of_them in zip(both_ways(module, quarter, x), both_ways(module, whole, x), strict=True):
        assert fewer < 3 * all_of_them


@pytest.mark.parametrize(("module", "size", "takes"), [
    (nn.Conv2d(64, 64, 3, padding=1), (14, 14), True),
    (nn.Conv2d(64, 96, 3), (10, 10), True),
    (nn.Conv2d(512, 512, 3, padding=1), (28, 28), True),
    (nn.Conv2d(512, 512, 3, padding=1), (7, 7), False),  # weights that take more than images do
    (nn.Conv2d(64, 64, 3, padding=1), (5, 5), False),  # tiles half empty
    (nn.Conv2d(3, 64, 3, padding=1), (14, 14), False),
    (nn.Conv2d(64, 64, 3, padding=3), (14, 14), False),  # backward would crop
    (nn.Conv2d(64, 64, 3, 2, 1), (14, 14), False),
    (nn.Conv2d(64, 64, 3, padding=2, dilation=2), (14, 14), False),
    (nn.Conv2d(64, 64, 3, padding=1, groups=2), (14, 14), False),
    (nn.Conv2d(64, 64, 1), (14, 14), False),
    (nn.Conv2d(64, 64, 3, padding=1).bfloat16(), (14, 14), False),
    (nn.Linear(64, 64), (), False),
])
def test_which_layers_take_it(module: nn.Module, size: tuple[int, ...], takes: bool) -> None:
    assert winograd.takes(module, size) is takes


class Net(nn.Module):
    """With a ReLU of each kind behind a convolution, and one convolution behind which there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.relu = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        self.two, self.three, self.four = (nn.Conv2d(32, 32, 3, padding=pad) for pad in (1, 0, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x)) + x
        x = self.four(self.relu(self.three(x))).clamp(0, 6)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def test_scores_are_those_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    batch = (random(4, 3, 16, 16), torch.arange(4))
    taken: list[str] = []
    takes = winograd.takes
    monkeypatch.setattr(winograd, "takes", lambda layer, size: takes(layer, size) and (taken.append(layer) or True))
    scores = fastscore.score(model, [batch], gradient="loss", progress=False)
    assert len(taken) == 3
    exact = fastscore.score(copy.deepcopy(model).double(), [(batch[0].double(), batch[1])], gradient="loss",
                            progress=False)
    for name in exact:
        torch.testing.assert_close(scores[name].double(), exact[name].double(), rtol=1e-4, atol=1e-9)
    assert math.isfinite(sum(float(scores[name].sum()) for name in scores))
