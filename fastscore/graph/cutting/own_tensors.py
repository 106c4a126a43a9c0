"""Parameters and buffers that the code of a module reads itself: layer scales, gains, embeddings of positions, class
tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import channel_buffers
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.modules.inspection import held_in
from fastscore.modules.narrower import without
from fastscore.modules.returned_part import Table
from fastscore.modules.weights.parameter_layers import ParameterLayer

_LAYERS = {OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV, OPTYPE.LINEAR, OPTYPE.EMBED}


def cut(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Take `index` (int64) of dimension `dim` out of the parameter, buffer or other tensor of that qualified name, in
    place.

    A parameter is a new object afterwards.
    """
    owner, key = held_in(model, name)
    if isinstance(layer := owner._modules.get(key), ParameterLayer):  # of an evaluation copy
        weight: Any = layer.weight
        layer.weight = without(weight, layer.at(dim), index)
        layer.measure()
        return
    old: Tensor = getattr(owner, key)
    new = without(old, dim, index)
    setattr(owner, key, new)
    if isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = new.shape
    elif isinstance(owner, nn.Linear) and key == "weight":
        owner.out_features, owner.in_features = new.shape
    for name, value in list(vars(owner).items()):  # the shape that the code gives it, as timm's Scale does
        if type(value) is tuple and _is_shape(value, old.shape[dim]):
            setattr(owner, name, tuple(new.shape[dim] if size == old.shape[dim] else size for size in value))


def _is_shape(value: tuple[object, ...], width: int) -> bool:
    """Whether it is one by which a vector of that width meets channels: all other sizes are 1."""
    return width > 1 and value.count(width) == 1 and value.count(1) == len(value) - 1


def require_gradients(model: nn.Module) -> None:
    """Have all parameters of a copy that is traced require gradients, and the buffers of layers that have no parameter:
    the tracer follows grad_fn, which what such a layer makes of a batch would not have."""
    for module in model.modules():
        own: tuple[Tensor | None, ...] = tuple(module._parameters.values())
        if not any(tensor is not None for tensor in own) and type_of(module) in _LAYERS:
            own = tuple(module._buffers.values())
        for tensor in own:
            if tensor is not None:
                tensor.requires_grad_(tensor.is_floating_point())


def randomize_constants(model: nn.Module) -> None:
    """Make those that hold one number throughout, as layer scales of 1e-6 do before training, random in [0.5, 1.5); and
    biases, and what BatchNorms have for each channel (their means in [-0.5, 0.5)).

    In place, for a copy that is traced: what hardly shows cannot be followed, and who reads one entry of a bias that is
    zero reads another after training.
    """
    generator = torch.Generator().manual_seed(0)
    random: dict[int, Tensor] = {}

    def note(tensor: Tensor | None, centre: float = 1.0) -> None:
        if tensor is not None and tensor.is_floating_point() and tensor.numel() > 1 and id(tensor) not in random and \
                bool((tensor == tensor.flatten()[0]).all()):
            values = (centre - 0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
            random[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else \
                values

    for module in model.modules():
        own = type_of(module) == OPTYPE.ELEMENTWISE
        for parameter in module._parameters.values():
            if parameter is not None and (own or parameter.dim() == 1):
                note(parameter)
        for name, buffer in module._buffers.items() if isinstance(module, nn.modules.batchnorm._NormBase) else ():
            note(buffer, float(name != "running_mean"))  # means above zero would leave ReLUs nothing
    for module in model.modules():  # one that several hold stays one
        of_module: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for held in of_module:
            held.update({name: random[id(tensor)] for name, tensor in held.items() if id(tensor) in random})


@contextmanager
def buffers_as_parameters(model: nn.Module) -> Iterator[bool]:
    """In the block, the floating-point buffers that the code of a module reads itself are parameters of it, which the
    tracer follows; whether there is any.

    For a copy that is traced. Buffers of a module that has nothing else are left to
    fastscore.graph.cutting.channel_buffers.
    """
    promoted: list[tuple[nn.Module, str, Tensor]] = []
    made: dict[int, Table] = {}
    for module in model.modules():
        if type_of(module) != OPTYPE.ELEMENTWISE or channel_buffers.width(module) is not None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.numel() > 1:
                promoted.append((module, name, buffer))
    for module, name, buffer in promoted:
        del module._buffers[name]
        module._parameters[name] = made.setdefault(id(buffer), Table(buffer.detach()))
    try:
        yield bool(promoted)
    finally:
        for module, name, buffer in promoted:
            del module._parameters[name]
            module._buffers[name] = buffer
