"""NaN and infinity: the layer, the input or the loss is named, before anything changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import X, refused, score, trained
from torch import Tensor, nn

import fastscore


def test_nan_and_infinity_name_the_layer() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for layer in ("stem.0", "block1.conv2", "block2.shortcut.0", "head.fc"):
            model = trained()
            model.get_submodule(layer).weight.data.view(-1)[3] = value
            refused(FloatingPointError, f"^{layer}: NaN or infinity in its weights", model, lambda: score(model))  # noqa: B023
    for norm, buffer in (("block1.bn1", "running_mean"), ("stem.1", "running_var")):
        model = trained()
        getattr(model.get_submodule(norm), buffer)[1] = math.nan
        refused(FloatingPointError, rf"^{norm}: NaN or infinity in its output", model, lambda: score(model))  # noqa: B023


def test_nan_in_the_last_bias_or_in_an_operation() -> None:
    model = trained()
    model.head.fc.bias.data[0] = math.nan
    refused(FloatingPointError, r"^head\.fc: NaN or infinity in its weights", model, lambda: score(model))
    model = trained()
    model.block1.register_forward_hook(lambda module, args, output: output / 0)
    refused(FloatingPointError, r"NaN or infinity", model, lambda: score(model))


def test_nan_in_the_input() -> None:
    model, x = trained(), X.clone()
    x[2, 1] = math.nan
    said = r"^batches: NaN or infinity in the input; sample {} of batch {} \(.*\) {} such a value: leave {} out$"
    for batches, named in (([X, x], (2, 1, "holds", "it")), (iter([X, X, x]), (2, 2, "holds", "it")),
                           ([X, torch.cat([X, x, x]), X], (6, 1, "and 1 other sample hold", "them"))):
        refused(FloatingPointError, said.format(*named), model, lambda batches=batches: score(model, batches))


class Loud(nn.Module):
    """Takes the logarithm of what it is given, which the first layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _clamped()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.abs().log())


def _clamped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize(("build", "value"), [
    (_clamped, math.nan), (Loud, 0.0),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)), math.nan)])
def test_one_value_of_a_later_batch(build: Callable[[], nn.Module], value: float, precision: Any) -> None:
    """oneDNN's clamps, which layers are fused with, make zero of NaN."""
    model, batches = build().eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    batches[2][1, 1, 3, 4] = value
    if value == 0:
        batches[2][1] = 0
    assert not torch.isfinite(model(batches[2])).all()
    refused(FloatingPointError, "NaN or infinity", model,
            lambda: score(model, batches, precision=precision))
    assert score(model, batches[:2], precision=precision).samples == 8


def test_nan_in_weights_that_are_ranked() -> None:
    model = trained()
    model.block1.conv2.weight.data[0, 0] = math.nan
    refused(FloatingPointError, r"^stem\.0: NaN or infinity in the weights", model,
            lambda: score(model, importance="magnitude-l1"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value: float) -> None:
    model = trained()
    refused(ValueError, f"^loss: it is -?{value}", model,
            lambda: score(model, gradient="loss", loss=lambda output, batch: output.sum() * value))


@pytest.mark.parametrize("loss", [lambda output, batch: 3.0, lambda output, batch: output, lambda output, batch: None,
                                  lambda output, batch: torch.tensor(1.0), lambda output, batch: output.detach().sum()])
def test_a_loss_that_is_no_scalar_of_the_output(loss: Callable[..., Any]) -> None:
    model = trained()
    refused(ValueError, "^loss: it must return a scalar tensor computed from the output", model,
            lambda: score(model, gradient="loss", loss=loss))


@pytest.mark.parametrize(("layer", "tensor"), [("3", "weight"), ("1", "running_var")])
def test_weights_that_are_not_numbers_are_named(layer: str, tensor: str) -> None:
    """After scoring, as where fine-tuning went wrong: what was cut from them was no network, and nothing said so."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(),
                          nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(4, 3, 8, 8)
    scores = fastscore.score(model, [x], progress=False)
    with torch.no_grad():
        getattr(model[int(layer)], tensor)[0] = torch.nan
    acts: tuple[Callable[..., Any], ...] = (
        lambda **options: fastscore.prune(model, scores, x, channels=0.9, **options),
        lambda **options: fastscore.prune(model, scores, x, channels=0.9, inplace=not options, **options),
        lambda **options: fastscore.mask(model, scores, 0.1, x, **options).__enter__())
    for act in acts:
        refused(FloatingPointError, f"^{layer}: NaN in its {tensor}: .*ignore='{layer}'", model, act)
    assert fastscore.prune(model, scores, x, channels=0.9, ignore=layer).removed.keys() <= {"3", "5"} - {layer}
