"""Normalisations over channels (LayerNorm, RMSNorm and their kin), known by what they compute; and with fewer channels.

Channels that are gone count as zeros: means and mean squares stay over the dense width, so that what remains is what it
was where those channels read as zero. A channel's gate multiplies it in the statistics, and what is made of it at the
layers that read it. A normalisation may hold what it then gives each number to: activations.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.copying import own_attributes
from fastscore.modules.hooks import input_of
from fastscore.modules.narrower import staying, without
from fastscore.modules.norms import activations, gated_norms
from fastscore.modules.norms.channel_norm import ChannelNorm, ResponseNorm
from fastscore.modules.norms.finding import find, has_eps


class NarrowedNorm(nn.Module):
    """A normalisation that has lost channels: see ChannelNorm. Made by `narrow` alone, of the module that it was.

    width: how many channels there are; None where it was made for any number. lost: how many there were besides: sums
    are divided by as many as there were.
    """

    channel_norm: ChannelNorm | ResponseNorm
    width: int | None
    lost: int

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Of the shape and dtype of the one tensor that it is called on, by whatever keyword the dense norm had."""
        gain, shift = (self._parameters.get(name) for name in (self.channel_norm.gain, self.channel_norm.shift))
        x = input_of(args, kwargs)
        return activations.made(self, self.channel_norm(x, gain, shift, x.shape[self.channel_norm.dim] + self.lost))

    def extra_repr(self) -> str:
        """Widths, and what is computed."""
        of = "" if self.width is None else f"{self.width} of {self.width + self.lost}, "
        return f"{of}{self.channel_norm}" if of else f"without {self.lost}, {self.channel_norm}"


def norm_of(module: nn.Module) -> ChannelNorm | ResponseNorm | None:
    """What a module computes, if that is a normalisation over channels with at most a gain and a shift of one number
    each, or one for all, and then what it holds of each number; None for all others.

    A copy with random parameters is tried: what it and they are called does not matter, nor a `forward` of its own.
    """
    if isinstance(module, NarrowedNorm):
        return module.channel_norm
    size = width(module)
    if size is None and not _may_be_for_any_width(module):
        return None
    own = {name: value for name, value in own_attributes(module).items() if name != "forward"}
    parts = type(module), size, *((name, None if parameter is None else parameter.shape)
                                for name, parameter in module._parameters.items()), *module._modules.items()
    if module._modules or not all(isinstance(value, _PLAIN) for value in own.values()):  # which may count
        if module not in _found_of or _found_of[module][0] != parts:
            _found_of[module] = parts, find(module, size)
        return _found_of[module][1]
    key = *parts, *own.items()
    if key not in _found:
        _found[key] = find(module, size)
    return _found[key]


_PLAIN = (bool, int, float, str, tuple, torch.Size, torch.dtype, type(None))
_found: dict[Any, ChannelNorm | ResponseNorm | None] = {}
_found_of: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, ChannelNorm | ResponseNorm | None]]" = \
    weakref.WeakKeyDictionary()


def width(module: nn.Module) -> int | None:
    """For how many channels a module that may be a ChannelNorm is; None where it can be none, or is for any number."""
    if isinstance(module, NarrowedNorm):
        return module.width
    if not _stands_alone(module):
        return None
    shapes = {tuple(parameter.shape) for parameter in module._parameters.values() if parameter is not None}
    if type(module).__module__.startswith("torch.") and not has_eps(module):
        return None
    sizes = {(max(shape),) if shape and max(shape) == math.prod(shape) else shape for shape in shapes}
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        sizes.add(tuple(shape) if isinstance(shape, (tuple, list)) else (shape,))
    elif sizes == {(1,)}:
        return None
    return sizes.pop()[0] if len(sizes) == 1 and all(len(size) == 1 for size in sizes) else None


def _stands_alone(module: nn.Module) -> bool:
    return not (module._buffers or len(module._parameters) > 2 or isinstance(module, torch.jit.ScriptModule)) and \
        activations.may_be_activations(module)


def _may_be_for_any_width(module: nn.Module) -> bool:
    """Whether a module of a class of the user's, with parameters of one number at most, may be one for any number of
    channels, by the names in its code."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and not type(module).__module__.startswith("torch.") and not module._modules and \
        _stands_alone(module) and all(
        parameter is None or parameter.numel() == 1 for parameter in module._parameters.values()) and any(
        name in _OF_NORMS or "norm" in name for name in code.co_names)


_OF_NORMS = {"rsqrt", "sqrt", "mean", "sum", "std", "var"}


def narrow(module: nn.Module, gone: Tensor) -> None:
    """Take the channels `gone`, int64 [R], out of a ChannelNorm, in place; its parameters are new objects then."""
    if (gated := gated_norms.gated_norm_of(module)) is not None:
        gated_norms.narrow(module, gated, gone)
        return
    norm, size = norm_of(module), width(module)
    assert norm is not None
    if size is None and isinstance(norm, ChannelNorm) and norm.ignores_width:
        return  # its own code makes the same of what is left
    if not isinstance(module, NarrowedNorm):
        module.channel_norm, module.lost = norm, 0  # type: ignore[assignment]
        module.__class__ = NarrowedNorm
    module.lost += len(gone)  # type: ignore[assignment, operator]
    if size is None:
        module.width = None  # type: ignore[assignment]
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = without(parameter, parameter.shape.index(size), gone)
    left = len(staying(size, gone))
    module.width = left  # type: ignore[assignment]
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (left,)  # type: ignore[assignment]


def gradient_of_statistics(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """The gradient of the input x of a ChannelNorm through mean and mean square alone, from that of its output."""
    if (gated := gated_norms.gated_norm_of(module)) is not None:
        return gated_norms.gradient_of_statistics(module, gated, x, g)
    norm = norm_of(module)
    assert norm is not None
    gain, shift = (None if (held := module._parameters.get(name)) is None else held.detach()
                   for name in (norm.gain, norm.shift))
    dense_width = x.shape[norm.dim] + getattr(module, "lost", 0)
    if module._modules:
        g = activations.gradient_before(module, norm(x, gain, shift, dense_width), g)
    return norm.gradient_of_statistics(x, g, gain, dense_width)


class OneNode(torch.autograd.Function):
    """A module's forward as one node of autograd's graph, which leads to its input, and to those of its parameters that
    are given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, *parameters: Tensor) -> Tensor:
        y: Tensor = type(module).forward(module, x)
        return y.clone() if y._is_view() else y  # which may be written to

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError("a graph that is traced has no gradients")
