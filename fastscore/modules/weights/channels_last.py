"""Convolutions of a class of its own whose code takes channels last, [N, L, C], and turns what it reads and makes: as
Parakeet's head does."""

import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.copying import deepcopy

_KNOWN = ("torch", "fastscore")  # whose convolutions take channels first
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[type[nn.Module], bool]]" = weakref.WeakKeyDictionary()


def takes_channels_last(layer: nn.modules.conv._ConvNd) -> bool:
    """Whether a convolution has its channels in the last dimension of what it reads and makes, and runs with them
    nowhere else. A copy is tried, without numbers; the layer is not run."""
    kind = type(layer)
    if str(getattr(kind.forward, "__module__", "")).partition(".")[0] in _KNOWN or layer._modules:
        return False
    if layer not in _found or _found[layer][0] is not kind:
        _found[layer] = kind, not _runs(layer, 1) and _runs(layer, -1)
    return _found[layer][1]


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or makes, as one of PyTorch's would have it, where the code of a convolution turns it."""
    return x.movedim(-1, 1) if isinstance(layer, nn.modules.conv._ConvNd) and takes_channels_last(layer) else x


def _runs(layer: nn.modules.conv._ConvNd, dim: int) -> bool:
    """Whether it makes an image of one with channels in that dimension, 1 or -1."""
    widths = layer.in_channels, layer.out_channels
    places = [sum(widths) + 2 * step * kernel for step, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    size = [2, widths[0], *places] if dim == 1 else [2, *places, widths[0]]
    held = (*layer._parameters.values(), *layer._buffers.values())
    memo: dict[int, Any] = {id(x): torch.empty_like(x, device="meta") for x in held if x is not None}
    memo |= {id(hooks): {} for name, hooks in vars(layer).items() if name.endswith("_hooks")}  # which may hold a model
    with torch.no_grad(), suppress(Exception):  # of what takes something else
        alone: Any = deepcopy(layer, memo)
        alone.training = False
        made = type(alone).forward(alone, torch.empty(size, device="meta", dtype=alone.weight.dtype))
        return isinstance(made, Tensor) and made.dim() == len(size) and made.shape[dim] == widths[1]
    return False
