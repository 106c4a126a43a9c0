"""Code run with functions that let gradients pass, whatever they are given.

A softmax of random numbers a hundred apart chooses one of them, and a ReLU may be given none above zero: then nothing
that was computed before them has a gradient, and which of it shows where cannot be told.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX: set[Callable[..., Any]] = {torch.softmax, Tensor.softmax, F.softmax}
_FLAT: set[Callable[..., Any]] = {
    torch.relu, Tensor.relu, F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, torch.sigmoid,
    Tensor.sigmoid, F.sigmoid, torch.tanh, Tensor.tanh, F.tanh}


class Tempered(TorchFunctionMode):
    """In the block softmaxes read numbers that are near each other, and functions of each entry by itself have a slope
    everywhere. What depends on what stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, x = dict(kwargs or {}), args[0] if args else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            return func(x.asinh(), *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention and len(args) > 2:
            longest = args[1].detach().norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
            query, key = (y / size.clamp_min(1) for y, size in (
                (x, x.detach().norm(dim=-1, keepdim=True)), (args[1], longest)))
            return func(query, key, *args[2:], **{**kwargs, "scale": 1.0})
        output = func(*args, **kwargs)
        return output + 0.1 * x if func in _FLAT and not kwargs.get("inplace") else output
