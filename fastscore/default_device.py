"""torch.set_default_device(), which says where a user's code makes tensors: this library's own lie on the CPU, or where
it says, whatever the user set."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

P = ParamSpec("P")
R = TypeVar("R")
_OWN = __name__.partition(".")[0]
_BETWEEN = {"torch", "torch_pruning", "safetensors", "functools", "contextlib"}  # make tensors for whoever calls them
_TAKING = {torch.tensor, torch.as_tensor, torch.asarray}  # make one where what they are given is


class _OwnOnCpu(TorchFunctionMode):
    """Hands operations on, and those that make a tensor with the device that they have without a default one where this
    library's code asks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and _is_own(sys._getframe(1)):
            given = args[0] if args and func in _TAKING else None
            kwargs["device"] = given.device if isinstance(given, Tensor) else torch.device("cpu")
        return func(*args, **kwargs)


def _is_own(frame: FrameType | None) -> bool:
    """Whether this library asks for what is made in a frame, and no code of a model that it runs."""
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        name = frame.f_code.co_name
        if (package == "torch" and name == "forward") or package not in {*_BETWEEN, _OWN}:
            return False
        if package == _OWN and name != "__torch_function__":  # which hands on what others ask for
            return True
        frame = frame.f_back
    return False


@contextmanager
def own_on_cpu() -> Iterator[None]:
    """A block in which this library's tensors lie where they do without a default device."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with _OwnOnCpu():
        yield


def keeps_own_on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in such a block."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_on_cpu():
            return function(*args, **kwargs)

    return wrapped
