"""Normalisations over channels (LayerNorm, RMSNorm and their kin), known by what they compute; and with fewer channels.

Channels that are gone count as zeros: means and mean squares stay over the dense width, so that what remains is what it
was where those channels read as zero. A channel's gate multiplies it in the statistics, and what is made of it at the
layers that read it.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.hooks import input_of
from fastscore.modules.narrower import staying, without
from fastscore.modules.norms.response_norms import ResponseNorm

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
_PARAMETERS = {"weight", "bias"}
_RESPONSE_EPS = 1e-6  # what a global response normalisation adds whose code holds the number
_TOLERANCE = 1e-4  # some compute in float32 whatever they are given


@dataclass(frozen=True)
class ChannelNorm:
    """What a module computes of x: (x - mean) / sqrt(mean of squares + eps) * (weight + offset) + bias, over one
    dimension.

    Attributes:
        dim: that of the channels, from the end: -1, or -3 in images.
        centered: whether the mean is taken off first (LayerNorm), or not (RMSNorm).
        offset: 1 where weights are kept as differences from 1, as in Gemma.
        eps: None: the rounding of the input's dtype, as in nn.RMSNorm.
    """

    dim: int
    centered: bool
    offset: float
    eps: float | None

    def statistics(self, x: Tensor, dense_width: int) -> tuple[Tensor, Tensor]:
        """(x less the mean where it is taken off, 1 / sqrt(mean of squares + eps)), of x in float32 or wider."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if not self.centered:
            return x, (x.square().sum(self.dim, keepdim=True) / dense_width + eps).rsqrt()
        mean = x.sum(self.dim, keepdim=True) / dense_width
        x = x - mean
        zeros = (dense_width - x.shape[self.dim]) * mean.square()  # what channels that are gone are away from the mean
        return x, ((x.square().sum(self.dim, keepdim=True) + zeros) / dense_width + eps).rsqrt()

    def along_channels(self, values: Tensor) -> Tensor:
        """[C] in a shape that broadcasts over the input."""
        return values.view(-1, *[1] * (-1 - self.dim))

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, dense_width: int) -> Tensor:
        """What the module computes; x may have fewer channels than `dense_width`."""
        centered, scale = self.statistics(_wide(x), dense_width)
        y = centered * scale
        if weight is not None:
            y = y * self.along_channels(weight + self.offset if self.offset else weight)
        if bias is not None:
            y = y + self.along_channels(bias)
        return y.to(x.dtype)

    def gradient_of_statistics(self, x: Tensor, g: Tensor, weight: Tensor | None, dense_width: int) -> Tensor:
        """The gradient of x through mean and mean square alone, from that of the output: of x's shape and dtype."""
        centered, scale = self.statistics(_wide(x), dense_width)
        g = _wide(g)
        if weight is not None:
            g = g * self.along_channels(weight + self.offset if self.offset else weight)
        normalized = centered * scale
        through = normalized * (g * normalized).sum(self.dim, keepdim=True)
        if self.centered:
            through = through + g.sum(self.dim, keepdim=True)
        return (through * (scale / -dense_width)).to(x.dtype)


class NarrowedNorm(nn.Module):
    """A normalisation that has lost channels: see ChannelNorm. Made by `narrow` alone, of the module that it was.

    Attributes:
        width: how many channels there are. dense_width: how many there were, by which sums are divided.
    """

    channel_norm: ChannelNorm | ResponseNorm
    width: int
    dense_width: int
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Of the shape and dtype of the one tensor that it is called on, by whatever keyword the dense norm had."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        return self.channel_norm(input_of(args, kwargs), weight, bias, self.dense_width)

    def extra_repr(self) -> str:
        """Widths, and what is computed."""
        return f"{self.width} of {self.dense_width}, {self.channel_norm}"


def norm_of(module: nn.Module) -> ChannelNorm | ResponseNorm | None:
    """What a module computes, if that is a normalisation over channels with at most a weight and a bias of one number
    each; None for all others.

    A copy with random weights is tried: what it is called does not matter, nor a `forward` of its own.
    """
    if isinstance(module, NarrowedNorm):
        return module.channel_norm
    size = width(module)
    if size is None:
        return None
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE and name != "forward"}
    if not all(isinstance(value, _PLAIN) for value in own.values()):  # what it computes may depend on what is in there
        return _find(module, size)
    key = (type(module), size, *own.items(),
           *((name, parameter is None) for name, parameter in module._parameters.items()))
    if key not in _found:
        _found[key] = _find(module, size)
    return _found[key]


def _find(module: nn.Module, size: int) -> ChannelNorm | ResponseNorm | None:
    return next((norm for norm in _candidates(module) if _computes(module, norm, size)), None)


_PLAIN = (bool, int, float, str, tuple, torch.Size, torch.dtype, type(None))
_OF_EVERY_MODULE = set(vars(nn.Module()))
_found: dict[Any, ChannelNorm | ResponseNorm | None] = {}


def width(module: nn.Module) -> int | None:
    """For how many channels a module that may be a ChannelNorm is; None where it can be none."""
    if isinstance(module, NarrowedNorm):
        return module.width
    if module._modules or module._buffers or not set(module._parameters) <= _PARAMETERS:
        return None
    shapes = {tuple(parameter.shape) for parameter in module._parameters.values() if parameter is not None}
    if not any(hasattr(module, name) for name in _EPS) and not any(len(shape) == 4 for shape in shapes):
        return None
    sizes = {(max(shape),) if shape and max(shape) == math.prod(shape) else shape for shape in shapes}
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        sizes.add(tuple(shape) if isinstance(shape, (tuple, list)) else (shape,))
    return sizes.pop()[0] if len(sizes) == 1 and all(len(size) == 1 for size in sizes) else None


def narrow(module: nn.Module, gone: Tensor) -> None:
    """Take the channels `gone`, int64 [R], out of a ChannelNorm, in place; its parameters are new objects then."""
    norm, size = norm_of(module), width(module)
    assert norm is not None
    assert size is not None
    if not isinstance(module, NarrowedNorm):
        module.channel_norm, module.dense_width = norm, size  # type: ignore[assignment]
        module.__class__ = NarrowedNorm
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = without(parameter, parameter.shape.index(size), gone)
    left = len(staying(size, gone))
    module.width = left  # type: ignore[assignment]
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (left,)  # type: ignore[assignment]


def gradient_of_statistics(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """The gradient of the input x of a ChannelNorm through mean and mean square alone, from that of its output."""
    norm, size = norm_of(module), width(module)
    assert norm is not None
    assert size is not None
    weight = module._parameters.get("weight")
    return norm.gradient_of_statistics(x, g, None if weight is None else weight.detach(),
                                       getattr(module, "dense_width", size))


def _candidates(module: nn.Module) -> Iterator[ChannelNorm | ResponseNorm]:
    eps = [float(value) for name in _EPS if isinstance(value := getattr(module, name, None), (int, float))]
    own: list[float | None] = [*eps] if eps else [None]
    offsets = (0.0, 1.0) if module._parameters.get("weight") is not None else (0.0,)
    for values in itertools.product((-1, -3), (True, False), offsets, own):
        yield ChannelNorm(*values)
    for dim, value in itertools.product((-1, -3), eps or [_RESPONSE_EPS]):
        yield ResponseNorm(dim, value)


def _computes(module: nn.Module, norm: ChannelNorm | ResponseNorm, size: int) -> bool:
    """Whether that is what the module computes, with random weights, of inputs as large as eps lets count, and of
    larger ones; and nothing is mixed along other dimensions."""
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(module)
    trial._parameters = {name: None if parameter is None else
                         nn.Parameter(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), False)
                         for name, parameter in module._parameters.items()}
    response = isinstance(norm, ResponseNorm)
    shape = (2, size, 3, 4) if norm.dim == -3 else (2, 3, 4, size) if response else (2, 3, size)
    for scale in {1.0, (norm.eps or torch.finfo(torch.float64).eps) ** (1.0 if response else 0.5)}:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + 0.3 * scale
        try:
            with torch.no_grad():
                y = type(module).forward(trial, x)
        except Exception:  # whatever a module's code does with what it does not take
            return False
        want = norm(x, trial._parameters.get("weight"), trial._parameters.get("bias"), size)
        if not isinstance(y, Tensor) or y.shape != want.shape or \
                not torch.allclose(y.double(), want, rtol=0, atol=_TOLERANCE * float(want.abs().max())):
            return False
    return True


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
