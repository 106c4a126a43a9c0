"""What a module is to a graph of channels: what Torch-Pruning takes it for, but for some convolutions."""

from collections.abc import Collection
from typing import Any

import torch_pruning as tp
from torch import nn

from fastscore.modules.weights.parameter_layers import ParameterLayer

OPTYPE = tp.ops.OPTYPE


def type_of(module: nn.Module) -> Any:
    """The OPTYPE of a module. A convolution with one input in each of its groups is to a graph what a depthwise one is,
    however many outputs it makes of it."""
    kind = tp.ops.module2type(module)
    if kind == OPTYPE.LINEAR and holds_its_product(module):
        return OPTYPE.ELEMENTWISE
    return OPTYPE.DEPTHWISE_CONV if kind == OPTYPE.CONV and of_groups(module) else kind


def holds_its_product(module: nn.Module) -> bool:
    """Whether it is a Linear in which another layer multiplies by its weight, as in one that returns several things: of
    itself there is only the code around that."""
    return isinstance(module._modules.get("weight"), ParameterLayer)


def of_groups(module: nn.Module) -> bool:
    """Whether it is a convolution that makes several outputs of each input by itself (a depth multiplier), or one of
    each of several sets of inputs: whose groups go whole."""
    return isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and module.groups > 1 and \
        module.in_channels != module.out_channels and module.groups in (module.in_channels, module.out_channels)


def groups_of(module: nn.Module) -> int:
    """Into how many groups of equal width a grouped convolution or norm divides its channels, which stay as many; 1 for
    other layers, and for GroupNorms of one channel each, as many as there are."""
    if isinstance(module, nn.GroupNorm):
        return 1 if module.num_groups == module.num_channels else module.num_groups
    return int(getattr(module, "groups", 1))


def groups_left(groups: int, channels: int, gone: Collection[int]) -> int:
    """How many of `groups` groups of equal width still have a channel once those of `gone` are out: fewer where groups
    of one channel each have gone whole, also where they were wider in a dense model that loses all at once."""
    width = channels // groups
    return len({at // width for at in range(channels) if at not in gone})
