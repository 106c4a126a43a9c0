"""Changes of modules in place that can be taken back, or left."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

H = TypeVar("H", bound="Handle")


class Handle(ABC):
    """Modules are changed until `remove`, or the end of a block."""

    @abstractmethod
    def remove(self) -> None:
        """Give the modules back what they had."""

    @abstractmethod
    def make_permanent(self) -> None:
        """Let the modules be what they are now for good."""

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Where an exception ends the block, every module of `model` is of its class, holds its tensors and settings, and
    has its hooks again. The block may put other tensors there, or in a tensor's .data; it does not write into them."""
    held = [(module, type(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for module, kind, own, contents in held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(own)
            for container, before in contents:  # the same objects: whoever set a hook takes it off by its dictionary
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(before)
        for tensor, data, requires_grad in tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """(dictionary or list that a module holds, a copy of it)."""
    return [(value, value.copy()) for value in vars(module).values() if type(value) in (OrderedDict, dict, list)]
