"""Code that writes to a tensor whose values a gradient needs, as `x += branch(norm(x))` does."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastscore.batches.parts import tensors_of, version_of
from fastscore.modules.hooks import put_on


def overwritten(model: nn.Module, run: Callable[[nn.Module], object]) -> str | None:
    """The innermost module of a model that reads, first of all, what is written to afterwards; None where none does.

    Args:
        model: an evaluation copy.
        run: (model) -> its outputs, on an example.
    """
    read: list[tuple[str, Tensor, int]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.extend((name, x, version_of(x)) for x in tensors_of((args, kwargs)))

    with put_on(module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
                for name, module in model.named_modules() if not module._modules):
        run(model)
    return next((name for name, x, version in read if version_of(x) != version), None)
