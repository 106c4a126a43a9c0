"""The evaluation copy: a model of one's own, sharing the parameters of the user's, changed at will for speed.

Whatever is done here leaves the input of every Conv and Linear as it was, to rounding, and so the scores.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastscore import multihead
from fastscore.batches import Batch, map_tensors

_CONVOLUTIONS = {nn.Conv1d: False, nn.Conv2d: False, nn.Conv3d: False,  # type -> is it transposed?
                 nn.ConvTranspose1d: True, nn.ConvTranspose2d: True, nn.ConvTranspose3d: True}


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode with frozen parameters, which share their memory with the model's own."""
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
                              for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()
    for handle in multihead.stand_in(twin):
        handle.keep()
    return twin


def fold_batchnorms(model: nn.Module, normalized_by: Mapping[str, str]) -> None:
    """Fold BatchNorms into the weights of the convolutions before them, in place.

    model: an evaluation copy. normalized_by: layer -> the BatchNorm that alone reads its output.

    In evaluation mode BatchNorm is affine for each channel, so folding is exact. Layers with hooks,
    subclasses, and BatchNorms without running statistics stay as they are.
    """
    for layer_name, norm_name in normalized_by.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or _watched(layer, norm):
            continue
        if type(layer) not in _CONVOLUTIONS:  # behind a Linear, a BatchNorm may normalise another dimension
            continue
        fused: nn.Module = fuse_conv_bn_eval(layer, norm, _CONVOLUTIONS[type(layer)])  # type: ignore[type-var]
        model.set_submodule(layer_name, fused.requires_grad_(False))
        model.set_submodule(norm_name, nn.Identity())


def _watched(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
               or module._backward_pre_hooks or nn.utils.parametrize.is_parametrized(module) for module in modules)


def to_channels_last(batch: Batch) -> Batch:
    """The 4-D tensors of a batch, or a tensor, in channels_last memory format."""
    return map_tensors(lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4
                       else tensor, batch)
