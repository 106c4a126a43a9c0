"""A model in the middle of something, and what a refusal must leave as it was."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from networks import NETWORKS
from oracles import untouched
from torch import nn

import fastscore

RESIDUAL = NETWORKS["residual"]
X = RESIDUAL.inputs(4)


def score(model: nn.Module, batches: Any = (X,), **options: Any) -> fastscore.Scores:
    return fastscore.score(model, batches, progress=False, **options)


@cache
def scored() -> fastscore.Scores:
    """Of every model that `trained` makes."""
    return score(trained())


def trained(name: str = "residual") -> nn.Module:
    """In training mode, half frozen, with gradients: as a model is in the middle of something."""
    network = NETWORKS[name]
    model = network.traced()
    model(network.inputs(4)).square().sum().backward()
    model.train()
    next(model.children()).requires_grad_(False)
    return model


def refused(error: type[BaseException], message: str | None, model: nn.Module, act: Callable[[], Any]) -> None:
    with untouched(model), pytest.raises(error, match=message):
        act()
