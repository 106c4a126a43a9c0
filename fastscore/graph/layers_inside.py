"""Linears, convolutions and embeddings whose own code runs other modules, as detectron2's does, which has a
normalisation and an activation.

Torch-Pruning's tracer takes what a module returns for what its weight makes. Of such a layer that is what the last
module inside makes.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastscore.graph.autograd_nodes import parameters_of
from fastscore.graph.cutting import channel_buffers
from fastscore.graph.following.nodes import CHANNELWISE, PRODUCERS
from fastscore.graph.layer_types import holds_its_product, type_of
from fastscore.modules.inspection import parametrized
from fastscore.modules.norms.channel_norms import norm_of


def of(model: nn.Module) -> list[nn.Module]:
    """The Linears, convolutions and embeddings of `model` that hold layers, and these, which come first."""
    found = list[nn.Module]()
    for module in model.modules():
        if _holds_others(module):
            inside = [part for part in module.modules() if part is not module and part not in found]
            parts = [part for part in inside
                     if type_of(part) in PRODUCERS | CHANNELWISE or norm_of(part) is not None]
            found += [*parts, module] if parts or any(map(channel_buffers.width, inside)) else []
    return found


def move(of_function: dict[Any, Any], made: Mapping[nn.Module, list[Any]]) -> None:
    """Put modules where their own operations are, in `of_function`: autograd's function of what modules returned -> the
    last that returned it. made: module of those of `of` -> the functions of what it returned, in each call."""
    for module, functions in made.items():
        for function in functions:
            inner = _reading(function, module._parameters.get("weight")) if _holds_others(module) else function
            if inner is not None and function in of_function:
                if of_function[function] is module:
                    del of_function[function]
                of_function[inner] = module


def holds_norm(layer: nn.Module) -> bool:
    """Whether the code of a layer runs a normalisation over its channels, which it holds."""
    return _holds_others(layer) and any(norm_of(part) is not None for part in layer.modules() if part is not layer)


def _holds_others(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd, nn.Embedding)) and bool(module._modules) and \
        not parametrized(module) and not holds_its_product(module)


def _reading(function: Any, weight: Any) -> Any:
    """The nearest operation with a weight that a function of autograd is computed from; None where there is none."""
    work, seen = deque([function]), set[Any]()
    while work and weight is not None:
        node = work.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(parameter is weight for parameter in parameters_of(node)):
            return node
        work += [source for source, _ in node.next_functions]
    return None
