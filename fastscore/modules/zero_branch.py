"""What stands where a residual branch was: zeros, of the shape of its input; of the shape that its shortcut gives where
that changes it.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.batches.parts import tensors_of
from fastscore.modules.inspection import channel_dim, held_in


class ZeroBranch(nn.Module):
    """Adds nothing to the stream that it reads.

    Attributes:
        returns: how many things it returns: 0 for a tensor alone; else a tuple of zeros and, for all others, None.
        times: how many times as wide as what it reads the zeros are, along `dim`; of one channel, where 0.
    """

    def __init__(self, returns: int = 0, times: int = 1, dim: int = -1) -> None:
        super().__init__()
        self.returns, self.times, self.dim = returns, times, dim

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the first floating-point tensor that it is given."""
        x = first_floating(args, kwargs)
        assert x is not None
        zeros = torch.zeros_like(x if self.times else x.narrow(self.dim, 0, 1))
        zeros = torch.cat([zeros] * self.times, self.dim) if self.times > 1 else zeros
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros

    def extra_repr(self) -> str:
        """What it returns."""
        wider = f"times={self.times}, dim={self.dim}" if self.times != 1 else ""
        return f"returns={self.returns}" if self.returns else wider


Window: TypeAlias = Sequence[tuple[int, int, int, int]]  # of each dimension: kernel size, stride, padding, dilation
_KERNELS = ("kernel_size", "filt_size")  # of convolutions and pools, and of timm's that blur


class ResizedZeros(ZeroBranch):
    """Zeros of the size that a convolution or pool, or several, made of its input's; and of as many channels as the
    module beside it that is called `shortcut` makes, or as it reads.

    windows: of what changed the size, one after the other; none where all keep it.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        super().__init__()
        self.windows, self.shortcut, self.channels = windows, "", 0

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, channels, ...]."""
        return x.new_zeros(x.shape[0], self.channels if self.shortcut else x.shape[1],
                           *resized(x.shape[2:], self.windows))

    def extra_repr(self) -> str:
        """Where its shape comes from."""
        return f"windows={self.windows}" + (f", channels={self.channels}, as {self.shortcut} makes" if self.shortcut
                                          else "")


# `returns`, of a layer: so often as many times as wide as it reads; and zeros of one channel
WIDER = 1 << 16
ONE = WIDER - 1
SAME = -1  # returns: of as many channels as it reads. Below: as child number SAME - 1 - returns of its owner makes


def windows(module: nn.Module) -> list[Window]:
    """Those of the convolutions and pools in a module, or that it is, which change the size; in the order in which it
    holds them. Raises ValueError where no numbers tell one."""
    found = [_window(part) for part in module.modules() if any(hasattr(part, name) for name in _KERNELS)]
    return [window for window in found if any(
        stride > 1 or 2 * padding != dilation * (kernel - 1) for kernel, stride, padding, dilation in window)]


def resized(sizes: Sequence[int], windows: Sequence[Window]) -> list[int]:
    """The sizes that `windows`, one after the other, make of those of an image."""
    for window in windows:
        sizes = [(size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                 for size, (kernel, stride, padding, dilation) in zip(sizes, window, strict=True)]
    return list(sizes)


def _window(module: nn.Module) -> Window:
    size = next(name for name in _KERNELS if hasattr(module, name))
    dims = len(kernel) if isinstance(kernel := getattr(module, size), tuple) else 2
    parts = []
    for name, usual in ((size, 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(module, name, usual)
        if isinstance(value, list) and len({*value}) == 1:  # as much at both ends of each dimension
            value = value[0]
        value = (value,) * dims if isinstance(value, int) else value
        if not isinstance(value, tuple) or len(value) != dims or any(type(number) is not int for number in value):
            raise ValueError(f"{type(module).__name__} has {name}={value!r}")
        parts.append(value)
    if getattr(module, "ceil_mode", False) or getattr(module, "transposed", False):
        raise ValueError(f"{type(module).__name__} is of another kind")
    return list(zip(*parts, strict=True))


def channels_of(module: nn.Module) -> int:
    """How many the last layer in a module makes."""
    widths = [width for layer in module.modules()
              if (width := getattr(layer, "out_channels", None) or getattr(layer, "num_features", None)) is not None]
    if not widths or type(widths[-1]) is not int:
        raise ValueError(f"{type(module).__name__} holds no layer that makes channels")
    return int(widths[-1])


def keep_up(model: nn.Module) -> None:
    """Have zeros of a model, in which channels went, be of as many as shortcuts make now."""
    for module in model.modules():
        for zeros in module._modules.values():
            if isinstance(zeros, ResizedZeros) and zeros.shortcut:
                zeros.channels = channels_of(module.get_submodule(zeros.shortcut))


def first_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments of a call; None where there is none."""
    return next((tensor for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point()), None)


def put_zeros(model: nn.Module, name: str, returns: int) -> None:
    """Put zeros in the place of the branch of that qualified name, in place. returns: of a ZeroBranch; or what
    ResizedZeros stand there: see SAME."""
    old, owner = model.get_submodule(name), held_in(model, name)[0]
    zeros = ResizedZeros(windows(old)) if returns <= SAME else ZeroBranch(returns) if returns < ONE else \
        ZeroBranch(0, returns // WIDER, channel_dim(old))
    if isinstance(zeros, ResizedZeros) and returns < SAME:
        zeros.shortcut = list(owner._modules)[SAME - 1 - returns]
        zeros.channels = channels_of(owner.get_submodule(zeros.shortcut))
    for key, value in vars(old).items():  # such as batch_first, by which code around it decides
        if isinstance(value, bool) and not hasattr(zeros, key):
            setattr(zeros, key, value)
    _call_layers(model, name)
    put(model, name, zeros.train(old.training))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where that name stands, in place."""
    owner, key = held_in(model, name)
    owner._modules[key] = module


class EncoderLayer(nn.TransformerEncoderLayer):
    """What nn.TransformerEncoderLayer computes, of any modules in the place of its own; whose own code reads
    its layers in one fused kernel where it can."""

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        """As nn.TransformerEncoderLayer.forward."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x: Tensor = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        made: Tensor = self.norm2(x + self._ff_block(x))
        return made


def _call_layers(model: nn.Module, name: str) -> None:
    """Have what holds the module of that name, of PyTorch's own encoder, call it rather than read it, in place."""
    outer = [model.get_submodule(name[:end]) for end, sign in enumerate(name) if sign == "."]
    for module in (model, *outer):
        if type(module) is nn.TransformerEncoderLayer:
            module.__class__ = EncoderLayer
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only its layers' fused path takes nested ones
