"""Layers that compute something else than their own forward, and what they are called on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.inspection import submodule
from fastscore.modules.norms.gated_norms import elementwise, gated_norm_of


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


@contextmanager
def skipped(*models: nn.Module) -> Iterator[None]:
    """In the block, a GroupNorm gives what it reads, and a norm that is called with a gate what this makes of it: their
    statistics depend on all channels, their positions not."""
    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        return input_of(args, kwargs) if isinstance(module, nn.GroupNorm) else elementwise(module, args, kwargs)

    with put_on(module.register_forward_hook(skip, with_kwargs=True)
                for module in {module for model in {*models} for module in model.modules()}
                if isinstance(module, nn.GroupNorm) or gated_norm_of(module) is not None):
        yield
