"""Convolutions that wait for what is added to their output: addition and ReLU are then done before it is written.

oneDNN adds a tensor to a convolution's output, and takes the ReLU of the sum, while it still has that output in
registers. But code calls the convolution first, and adds afterwards. So the convolution hands out a stand-in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_SUMS = (Tensor.add, torch.add)
_EMPTY = torch.empty(0)  # what a stand-in is to C++, which sees no such class


class Deferred(Tensor):
    """Stands in for `compute(x)`. An addition to it becomes `add(x, other)`, if that takes `other`; whatever else reads
    or changes it finds what is computed then, as autograd would have it."""

    _pending: "_Pending"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) == 2:
            if func is Tensor.add_ and isinstance(args[0], Deferred):
                y = args[0]._pending.add(computed(args[1]))
                if y is not None:
                    args[0]._pending.made = y  # for whoever else has that stand-in
                    return y
            elif func in _SUMS:
                one, other = args if isinstance(args[0], Deferred) else reversed(args)
                y = one._pending.add(computed(other))
                if y is not None:
                    return y
        args, kwargs = tree_map_only(Deferred, computed, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


class _Pending:
    """What a Deferred stands for. made: it, once it is there."""

    def __init__(self, name: str, x: Tensor, compute: Callable[[Tensor], Tensor],
                 add: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        self.made: Tensor | None = None
        self._name, self._x, self._version = name, x, x._version
        self._compute, self._add = compute, add
        self._grad = torch.is_grad_enabled()

    def compute(self) -> Tensor:
        """What it stands for."""
        if self.made is None:
            with torch.set_grad_enabled(self._grad):
                self.made = self._compute(self._input())
        return self.made

    def add(self, other: Any) -> Tensor | None:
        """What stands for the sum with `other`, in one go; None where that takes two."""
        if self.made is not None or type(other) not in (Tensor, nn.Parameter) or self._grad != torch.is_grad_enabled():
            return None
        return self._add(self._input(), other)

    def _input(self) -> Tensor:
        if self._x._version != self._version:
            raise RuntimeError(f"{self._name}: its input was changed in place before its output was read, which it was "
                               "not in the first batch; set FASTSCORE_PORTABLE=1, and every layer runs when it is "
                               "called")
        return self._x


def deferred(name: str, x: Tensor, compute: Callable[[Tensor], Tensor],
             add: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor:
    """A stand-in for compute(x), which is called as soon as something reads it, or never. add(x, other): what the code
    is to get that adds another tensor to it; None where it is to add that itself. name: of the layer."""
    y = _EMPTY.as_subclass(Deferred)
    y._pending = _Pending(name, x, compute, add)
    return y


def computed(x: Any) -> Any:
    """`x`, or what it stands for."""
    return x._pending.compute() if isinstance(x, Deferred) else x
