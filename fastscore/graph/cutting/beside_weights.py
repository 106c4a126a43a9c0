"""What a layer of a class of its own keeps beside its weight, entry by entry: masks, the weights that a mask is put on,
steps of a quantiser. Where the weight loses channels, this loses the same."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.following.nodes import PRODUCERS
from fastscore.graph.layer_types import type_of
from fastscore.modules.inspection import runs_own_code


def own(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name there, tensor) of parameters and buffers that a Linear or convolution holds, itself or in a module
    that is no layer, with as many dimensions as its weight, each of the weight's size, or of 1."""
    weight = layer._parameters.get("weight")
    if weight is None or not runs_own_code(layer):
        return
    for module in layer.modules():
        if module is not layer and type_of(module) in PRODUCERS:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor is not weight and tensor.dim() == weight.dim() and tensor.numel() > 1 and \
                    all(size in (1, of_weight) for size, of_weight in zip(tensor.shape, weight.shape, strict=True)):
                yield module, name, tensor


def cut_with(layer: nn.Module, prune: Callable[[nn.Module], Any]) -> None:
    """Do to a layer what `prune` does, which takes channels out of its weight, and to what it keeps beside that."""
    weight, beside = layer._parameters.get("weight"), list(own(layer))
    cut = [_cut(layer, weight.shape, tensor, prune) for _, _, tensor in beside] if weight is not None else []
    prune(layer)
    for (module, name, old), new in zip(beside, cut, strict=True):
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(new, old.requires_grad)
        else:
            module._buffers[name] = new


def _cut(layer: nn.Module, shape: torch.Size, tensor: Tensor, prune: Callable[[nn.Module], Any]) -> Tensor:
    alone = copy.copy(layer)  # of which the tensor is the weight
    alone._parameters = {"weight": nn.Parameter(tensor.detach().to(torch.float64).expand(shape)), "bias": None}
    prune(alone)
    new: Tensor = alone._parameters["weight"].detach()  # type: ignore[union-attr]
    for dim, size in enumerate(tensor.shape):
        if size == 1:
            new = new.narrow(dim, 0, 1)
    return new.to(tensor.dtype).clone()
