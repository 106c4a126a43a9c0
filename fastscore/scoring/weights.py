"""Importances that read a model's weights: their size alone, or their products with a gradient."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.devices import with_float64
from fastscore.graph.cutting import heads
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.modules.weights import held_weights
from fastscore.modules.weights.own_layers import own_layer, weight_of
from fastscore.modules.weights.parameter_layers import ParameterLinear
from fastscore.modules.weights.transposed_linear import is_transposed

# (model, group, seed) -> [C]; None where the criterion says nothing about the group
WeightImportance = Callable[[nn.Module, ChannelGroup, int], Tensor | None]


def _filter_norm(p: int) -> WeightImportance:
    """The p-norm of all the weights that make a channel, over all its producers and depthwise convolutions."""

    def importance(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member, name in filter_parameters(model, group):
            if not name.endswith("bias"):
                weight = with_float64(model.get_parameter(name).detach()).double().cpu()
                total += _joint(group, member, _by_position(model, member, name, weight).abs().pow(p).sum(1))
        return total.pow(1 / p)

    return importance


def _bn_scale(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """The mean |γ| of the BatchNorms that the group's channels pass (Liu et al., arXiv 1708.06519)."""
    scales = []
    for member in group.role("channelwise", "gate"):
        layer = model.get_submodule(member.layer)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            scale = with_float64(layer.weight.detach()).double().abs().cpu()
            scales.append(_joint(group, member, scale) / _joint(group, member, torch.ones_like(scale)))
    return torch.stack(scales).mean(0) if scales else None


def _hash(text: str) -> int:
    """A 63-bit integer from text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _random(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Uniform in [0, 1), the same for the same seed and group name."""
    generator = torch.Generator().manual_seed(_hash(f"{seed} {group.name}"))
    return torch.rand(group.channels, generator=generator, dtype=torch.float64)


WEIGHT_IMPORTANCES: dict[str, WeightImportance] = {
    "magnitude-l1": _filter_norm(1),
    "magnitude-l2": _filter_norm(2),
    "bn-scale": _bn_scale,
    "random": _random,
}


def filter_products(model: nn.Module, group: ChannelGroup, gradients: Mapping[str, Tensor]) -> Tensor:
    """Σ (w·∂w)² over the weights of the filters that make each channel, and (b·∂b)²: float64 [C].

    gradients: qualified name of a parameter -> its gradient. Source: Molchanov et al., arXiv 1906.10771.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member, name in filter_parameters(model, group):
        if name in gradients:
            product = with_float64(model.get_parameter(name).detach()).double() * with_float64(gradients[name])
            total += _joint(group, member, _by_position(model, member, name, product.cpu()).square().sum(1))
    return total


def filter_parameters(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Member, str]]:
    """(layer, qualified name of a weight or bias) of everything that makes the group's channels: Conv, Linear,
    Embedding, and the projections that an attention module holds itself."""
    producers = {member.layer for member in group.role("producer")}
    producers |= {bias for layer in producers if (bias := held_weights.bias_of(model, layer)) is not None}
    for member in group.role("producer", "channelwise", "heads"):
        if member.holds == "":  # another layer holds it
            continue
        if held_weights.is_held(model, member.layer):
            yield from ((member, name) for name in (member.layer, held_weights.bias_of(model, member.layer)) if name)
            continue
        layer = model.get_submodule(member.layer)
        dense = isinstance(layer, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)) or is_transposed(layer)
        made = own_layer(layer)
        own = heads.PROJECTIONS if member.role == "heads" else ("weight", "bias") if dense else \
            () if made is None else (made.weight, made.bias)
        for name, parameter in layer.named_parameters(recurse=False):
            if name in own and parameter is not None and f"{member.layer}.{name}" not in producers:
                yield member, f"{member.layer}.{name}"


def _by_position(model: nn.Module, member: Member, name: str, values: Tensor) -> Tensor:
    """Values of the shape of the parameter called `name` -> a row for each position (or head) of the member."""
    if member.role == "heads":
        return heads.by_head(name.rpartition(".")[2], values, len(member.index))
    if values.dim() == 1:
        return values[:, None]
    if member.holds == name:
        return values.movedim(member.dim, 0).flatten(1)
    held = held_weights.is_held(model, member.layer)
    if held or isinstance(model.get_submodule(member.layer), ParameterLinear):
        return held_weights.by_output(model, member.layer, name, values) if held else \
            values.movedim(-1 if name.endswith("bias") else -2, 0).flatten(1)  # [E, outputs, inputs] of experts
    return _by_output(model.get_submodule(member.layer), values)


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight of `layer`, or something of its shape, with a row for each output channel: [C, everything else]."""
    own = own_layer(layer)
    if is_transposed(layer) or (own is not None and own.transposed):
        weight = weight.t()
    plain: Any = layer if own is None else own.made(weight_of(layer, own), False)
    if getattr(plain, "transposed", False):  # [in, out / groups, ...]
        groups = plain.groups
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.t() if isinstance(layer, nn.Embedding) else weight.flatten(1)


def _joint(group: ChannelGroup, member: Member, values: Tensor) -> Tensor:
    """Values of a layer's positions -> their sum for each channel of the group, tied channels as one, [C]."""
    units = torch.zeros(group.channels, dtype=values.dtype)
    return units.index_add_(0, group.unit[member.channel], values[member.index])[group.unit]
