"""Hooks that can be told from the user's."""

from collections.abc import Callable
from typing import Any

from torch import nn


class OwnHook:
    """A hook that can be told from the user's, that a copy of the model shares, and that a pickled one does without."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnHook":
        return self  # a copied model (an EMA, say) carries the hooks along; they know their own modules and stay quiet

    def __reduce__(self) -> tuple[type["OwnHook"], tuple[Callable[..., None]]]:
        return OwnHook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What hooks do in a model that was pickled."""


def remove_copied_hooks(model: nn.Module) -> None:
    """Take off a copy of a tapped or masked model the hooks that came along with it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, OwnHook):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
