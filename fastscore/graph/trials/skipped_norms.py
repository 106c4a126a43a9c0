"""Runs in which normalisations that are no recorded layers pass on what they read: their statistics depend on all
channels, their positions not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.norms.gated_norms import elementwise, gated_norm_of


@contextmanager
def skipped(*models: nn.Module) -> Iterator[None]:
    """In the block, a GroupNorm gives what it reads, and a norm that is called with a gate what this makes of it."""
    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        return input_of(args, kwargs) if isinstance(module, nn.GroupNorm) else elementwise(module, args, kwargs)

    with put_on(module.register_forward_hook(skip, with_kwargs=True)
                for module in {module for model in {*models} for module in model.modules()}
                if isinstance(module, nn.GroupNorm) or gated_norm_of(module) is not None):
        yield
