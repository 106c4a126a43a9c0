"""Layers whose weights or biases are buffers lose channels, and are repaired, as those whose are parameters."""

from typing import Literal

import pytest
import torch
from networks import randomize
from torch import Tensor, nn

import fastscore


class Untrained(nn.Module):
    """A convolution, a Linear and a BatchNorm whose weights, or biases, or both, are buffers: nothing trains them."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.first, self.norm, self.conv = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        for layer in (self.norm, self.conv, self.inner):
            for name in names:
                layer.register_buffer(name, layer._parameters.pop(name).detach())

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3]."""
        x = self.conv(self.norm(self.first(x)).relu()).relu().mean((2, 3))
        return self.head(self.inner(x).relu())


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
def test_weights_and_biases_that_are_buffers(names: tuple[str, ...]) -> None:
    model, x = randomize(Untrained(*names)).double().eval(), torch.randn(6, 3, 5, 5, dtype=torch.float64)
    scores = fastscore.score(model, [x])
    assert set(scores) == {"first", "conv", "inner"}
    for compensate in (False, True):
        result = fastscore.prune(model, scores, x[:1], channels=0.5, compensate=compensate)
        smaller = result.model
        assert {name for name, _ in smaller.named_buffers()} == {name for name, _ in model.named_buffers()}
        with fastscore.mask(model, scores, result, x[:1], compensate=compensate):
            torch.testing.assert_close(smaller(x), model(x), rtol=1e-9, atol=1e-9)
    assert result.report.channels[1] < result.report.channels[0]


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("repair", ["mean", "linear", "asymmetric"])
def test_what_a_repair_changes_stays_a_buffer(repair: Literal["mean", "linear", "asymmetric"],
                                              names: tuple[str, ...]) -> None:
    model, x = randomize(Untrained(*names)).double().eval(), torch.randn(16, 3, 5, 5, dtype=torch.float64)
    result = fastscore.prune(model, fastscore.score(model, [x], ablation="mean"), x[:1], channels=0.7, repair=repair,
                             calibration=[x], progress=False)
    small = result.model
    assert {name for name, _ in small.named_buffers()} == {name for name, _ in model.named_buffers()}
    assert all(parameter.requires_grad for parameter in small.parameters())
    changed = [name for key in names for name in (f"conv.{key}", f"inner.{key}")
               if small.get_buffer(name).shape != model.get_buffer(name).shape
               or not torch.equal(small.get_buffer(name), model.get_buffer(name))]
    assert changed


@pytest.mark.parametrize("layers", [("first",), ("first", "norm", "conv", "inner", "head")])
def test_layers_whose_inputs_need_no_gradients(layers: tuple[str, ...]) -> None:
    """Of the first layer, or all, both are buffers: what it makes of a batch has no gradient of its own."""
    def scored(model: nn.Module) -> fastscore.Scores:
        return fastscore.score(model, [x], gradient="loss", normalize=False,
                               loss=lambda output, batch: output.square().sum())

    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    model = randomize(Untrained()).double().eval()
    expected = scored(model)
    for layer in map(model.get_submodule, layers):
        for name in list(layer._parameters):
            layer.register_buffer(name, layer._parameters.pop(name).detach())
    scores = scored(model)
    assert set(scores) == set(expected) == {"first", "conv", "inner"}
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name])
    small = fastscore.prune(model, scores, x[:1], channels=0.5, compensate=False).model
    assert (small.first.out_channels, small.inner.in_features) < (8, 6)
    assert all(not buffer.requires_grad for buffer in (*model.buffers(), *small.buffers()))
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x[:1], compensate=False):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
