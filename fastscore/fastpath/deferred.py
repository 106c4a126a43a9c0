"""Convolutions that wait for what is done to their output: addition and ReLU are then done before it is written.

oneDNN adds a tensor to a convolution's output, and takes the ReLU of that or of the sum, while it still has that output
in registers. But code calls the convolution first, and adds, or calls F.relu, afterwards. So the convolution hands out
a stand-in, which becomes what it stands for as soon as anything else is done with it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_SUMS = (Tensor.add, torch.add)
_RELUS = {F.relu: False, torch.relu: False, Tensor.relu: False, F.relu_: True, torch.relu_: True, Tensor.relu_: True}
_WAY_OUT = "set FASTSCORE_PORTABLE=1, and every layer runs when it is called"


@dataclass(frozen=True)
class Work:
    """What a stand-in waits for, given the convolution's input x. Each takes the tensor to write into, which then is
    what it returns, or None for a new one.

    name: of the layer. compute(x, into): its output. add(x, other, into): what the code is to get that adds another
    tensor to the output; None where it is to add that itself. relu(x, into): what it is to get that takes the ReLU.
    """

    name: str
    compute: Callable[[Tensor, Tensor | None], Tensor]
    add: Callable[[Tensor, Tensor, Tensor | None], Tensor | None] | None = None
    relu: Callable[[Tensor, Tensor | None], Tensor] | None = None


class Deferred(Tensor):
    """Stands in for the output of `work`; an addition to it and a ReLU of it are done with that. Whatever else reads or
    changes it makes the very tensor that the layer would have returned of it, to autograd and C++ too."""

    _pending: "_Pending"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        y = None
        if not kwargs and len(args) == 2:
            if func is Tensor.add_ and isinstance(args[0], Deferred):
                y = args[0]._pending.add(computed(args[1]), args[0])
            elif func in _SUMS:
                one, other = args if isinstance(args[0], Deferred) else reversed(args)
                y = one._pending.add(computed(other), None)
        elif func in _RELUS and (settings := _relu_settings(*args, **kwargs or {})) is not None:
            x, inplace = settings
            y = x._pending.relu(x if inplace or _RELUS[func] else None)
        if y is not None:
            return y
        args, kwargs = tree_map_only(Deferred, computed, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _relu_settings(input: Tensor, inplace: bool = False) -> tuple[Any, bool]:
    """As F.relu takes them."""
    return input, inplace


class _Pending:
    """What a Deferred stands for, which is not there yet. x: the layer's input."""

    def __init__(self, x: Tensor, work: Work) -> None:
        self._work, self._x, self._version = work, x, x._version
        self._grad = torch.is_grad_enabled()

    def compute(self, into: Tensor) -> Tensor:
        """What it stands for."""
        if self._grad and not torch.is_grad_enabled() and _in_a_function():  # its edges are those of the stand-in
            raise RuntimeError(f"{self._work.name}: a torch.autograd.Function reads its output, which none did in the "
                               f"first batch; {_WAY_OUT}")
        with torch.set_grad_enabled(self._grad):
            return self._work.compute(self._input(), into)

    def add(self, other: Any, into: Tensor | None) -> Tensor | None:
        """What stands for the sum with `other`, in one go; None where that takes two."""
        if self._work.add is None or type(other) not in (Tensor, nn.Parameter) or self._grad != torch.is_grad_enabled():
            return None
        return self._work.add(self._input(), other, into)

    def relu(self, into: Tensor | None) -> Tensor | None:
        """What stands for its ReLU, in one go; None where that takes two."""
        if self._work.relu is None or self._grad != torch.is_grad_enabled():
            return None
        return self._work.relu(self._input(), into)

    def _input(self) -> Tensor:
        if self._x._version != self._version:
            raise RuntimeError(f"{self._work.name}: its input was changed in place before its output was read, which "
                               f"it was not in the first batch; {_WAY_OUT}")
        return self._x


def _in_a_function() -> bool:
    """Whether this runs in the forward() of a torch.autograd.Function."""
    codes, classes = set(), [torch.autograd.Function]
    while classes:
        function = classes.pop()
        classes += function.__subclasses__()
        codes.add(getattr(function.forward, "__code__", None))
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def deferred(x: Tensor, work: Work) -> Tensor:
    """A stand-in for work.compute(x), which is called as soon as something reads it, or never."""
    y: Any = Tensor._make_subclass(Deferred, torch.empty(0))  # is to C++, which sees no such class, what it is not yet
    y._pending = _Pending(x, work)
    stand_in: Tensor = y
    return stand_in


def computed(x: Any) -> Any:
    """`x`, or what it stands for: the same object, which is that from then on."""
    return x._pending.compute(x) if isinstance(x, Deferred) else x


def become(into: Any, y: Tensor) -> Tensor:
    """`into`, a stand-in, holding the numbers of `y`, and an ordinary tensor; what made it is autograd's to say."""
    del into._pending
    into.__class__ = Tensor
    into.data = y.detach()
    done: Tensor = into
    return done
