"""Hooks that can be told from the user's."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


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


def has_users_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that are not ours: they may keep, or change, what they see, and run where it is called
    alone."""
    return any(not isinstance(hook, OwnHook) for hooks in (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hook in hooks.values())


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Conv, Linear or BatchNorm is called on, by position or by keyword."""
    x: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return x


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of such a call, on x instead."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: x}


def reading_zero(index: Tensor, dim: int) -> OwnHook:
    """A pre-hook, with kwargs, by which a layer reads zero at `index` (int64) of a dimension."""
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = input_of(args, kwargs)
        return with_input(args, kwargs, x.index_fill(dim, index.to(x.device), 0))

    return OwnHook(hook)


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


@contextmanager
def put_on(handles: Iterable[Any]) -> Iterator[None]:
    """A block at whose end these hooks are taken off."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def layers_that(layers: Mapping[str, nn.Module], run: Callable[[], object], do: Callable[[Any, Any], bool]) -> set[str]:
    """Those of which do(args, output) is true of a call in one run."""
    found = set[str]()

    def note(name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if do(args, output):
            found.add(name)

    with put_on(layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()):
        run()
    return found


@contextmanager
def none_left_after_errors(model: nn.Module) -> Iterator[None]:
    """Forward hooks that are put on modules in the block are taken off, if it raises."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    except BaseException:
        for module, known in before.items():
            for number in set(module._forward_hooks) - known:
                del module._forward_hooks[number]
        raise
