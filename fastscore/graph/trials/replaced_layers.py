"""Layers that compute something else than their own forward, and what they are called on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.inspection import submodule


def read_by(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer is called on, by position or by keyword; None where that is no tensor, but a shape, say."""
    x = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    return x if isinstance(x, Tensor) else None


def unwrapped(x: Tensor) -> Tensor:
    """All that torch.func takes part by part, whose parts cannot be compared while it does."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


@contextmanager
def replaced(model: nn.Module, forwards: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """The layers' own forwards replaced in the block; whatever hooks they have run as they would."""
    for layer, forward in forwards.items():
        vars(submodule(model, layer))["forward"] = forward
    try:
        yield
    finally:
        for layer in forwards:
            del vars(submodule(model, layer))["forward"]
