"""Normalisations of each channel by itself that a module's own code runs with tensors of its own, `F.batch_norm(x,
self.mean, self.var, self.gain, self.shift)`.

Where a model ran, they are noted (see fastscore.modules.weights.noted_uses); in evaluation copies they run as the
operations that they are made of, of which each tensor is followed, and cut, as any that code adds or multiplies by.
"""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.modules import frames
from fastscore.modules.copying import counterparts
from fastscore.modules.forwards import ForwardWithin
from fastscore.modules.handles import Handle

_STATISTICS, _GAINS = ("running_mean", "running_var"), ("weight", "bias")
# function -> the names of its arguments behind the input; by_input: whether by the statistics of what it is given
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: (*_STATISTICS, *_GAINS, "by_input", "momentum", "eps"),
    F.instance_norm: (*_STATISTICS, *_GAINS, "by_input", "momentum", "eps"),
    torch.batch_norm: (*_GAINS, *_STATISTICS, "by_input", "momentum", "eps"),
    torch.instance_norm: (*_GAINS, *_STATISTICS, "by_input", "momentum", "eps"),
}

NOTED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # users' modules whose code does so


def is_own(func: Any, caller: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is such a normalisation, with at least one tensor. caller: the module whose code calls it."""
    if func not in _ARGUMENTS or isinstance(caller, nn.modules.batchnorm._NormBase):
        return False
    return isinstance(args[0] if args else kwargs.get("input"), Tensor) and \
        any(isinstance(value, Tensor) for value in (*args[1:5], *map(kwargs.get, (*_STATISTICS, *_GAINS))))


def _as_operations(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What such a call computes."""
    given: dict[str, Any] = {**dict(zip(("input", *_ARGUMENTS[func]), args, strict=False)), **kwargs}
    plain, eps = getattr(F, func.__name__), given.get("eps", 1e-5)
    x: Tensor = given["input"]
    by_input = given.get("by_input", given.get("training", given.get("use_input_stats", plain is F.instance_norm)))
    mean, var, weight, bias = (None if value is None else value.reshape(-1, *[1] * (x.dim() - 2))
                               for value in map(given.get, (*_STATISTICS, *_GAINS)))
    if by_input or mean is None or var is None:
        y: Tensor = plain(x, None, None, None, None, True, 0.1, eps)
        y = y if mean is None or var is None else y + 0 * (mean + var)  # whose width is asked for, all the same
    else:
        y = (x - mean) / (var + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


class _Operations(TorchFunctionMode):
    """In the block, those of a module's own code run as operations."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARGUMENTS and frames.innermost(frames.outwards()) is self._module and \
                is_own(func, self._module, args, kwargs):
            return _as_operations(func, args, kwargs)
        return func(*args, **kwargs)


class _Normalizes(ForwardWithin):
    """Of a module whose code normalises."""

    def block(self, module: nn.Module) -> _Operations:
        return _Operations(module)


def replace(model: nn.Module, noted: nn.Module) -> Iterator[Handle]:
    """Have modules whose code was noted normalise by operations, a handle for each. noted: the model that `model` is a
    copy of."""
    for _, own in counterparts(NOTED, noted, model):
        yield _Normalizes.put(own)
