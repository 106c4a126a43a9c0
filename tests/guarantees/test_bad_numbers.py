"""NaN and infinity: the layer, the input or the loss is named, before anything changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import X, refused, score, trained


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
    refused(FloatingPointError, "^batches: NaN or infinity in the input", model, lambda: score(model, [X, x]))


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
