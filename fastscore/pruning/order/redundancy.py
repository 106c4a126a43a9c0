"""In which order the channels of a group go where a linear repair follows.

An importance knows what the outputs make of a channel, and not whether other channels can stand in for it. What a
layer that reads channels x, with second moments C, still loses once the others have taken over what they can, is known
in closed form for one channel after another: with P = C⁻¹ of those that are left, and W what the layer's weights have
become so far, channel c costs |W_c|² / P_cc, and then

    W ← W - W_c P_c / P_cc,   P ← P - P_c P_cᵀ / P_cc.

That knows nothing of what follows the layer. The geometric mean of the two, taken anew after every channel that went,
says which goes next.

Source: the closed form is that of Frantar and Alistarh, Optimal Brain Compression, arXiv 2208.11580.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup
from fastscore.recovery.moments import Moments

RIDGE = 0.01  # of a channel's own variance
NOISE = 1e-6  # of the largest variance, below which a channel is taken to stand still
WIDEST = 3072  # channels, of which the order costs the cube
MOST = 0.75  # of the channels are taken one by one; the rest as they are then


@dataclass
class _Reader:
    """A block of a layer that reads channels: the inverse of its inputs' second moments, float64 [K, K], its weights
    [rows, K], and which of the group's units each input is, int64 [K]; -1 for what stays."""

    inverse: Tensor
    weight: Tensor
    unit: Tensor

    def costs(self, units: int) -> Tensor:
        """float64 [units]."""
        each = self.weight.square().sum(0) / self.inverse.diagonal()
        mine = self.unit >= 0
        return each.new_zeros(units).index_add(0, self.unit[mine], each[mine])

    def remove(self, unit: int) -> None:
        for at in (self.unit == unit).nonzero()[:, 0].tolist():
            row = self.inverse[at] / self.inverse[at, at]
            self.weight.addr_(self.weight[:, at].clone(), row, alpha=-1)
            self.inverse.addr_(self.inverse[:, at].clone(), row, alpha=-1)
            self.unit[at] = -1
            self.weight[:, at] = 0.0
            self.inverse[at], self.inverse[:, at] = 0.0, 0.0
            self.inverse[at, at] = 1.0


def values(model: nn.Module, group: ChannelGroup, importances: Tensor, moments: Mapping[str, Moments],
           normalized_by: Mapping[str, str]) -> Tensor:
    """In place of the importances of a group, [C], none below 0: float64 [C], in the order in which its channels go
    best, with their sum.

    Groups of more than WIDEST channels, of which a layer reads several that go together, or that are read by no layer
    of which moments are known, keep what they have. moments: of what layers read. normalized_by: layer -> the BatchNorm
    that alone reads its output, by which outputs are weighed.
    """
    before = importances.double()
    _, unit, sizes = group.unit.unique(return_inverse=True, return_counts=True)
    if group.channels > WIDEST:
        return before
    readers = _readers(model, group, unit, moments, normalized_by)
    if not readers or any(len(of.unique()) < len(of) for of in (reader.unit[reader.unit >= 0] for reader in readers)):
        return before
    importance = before.new_zeros(len(sizes)).index_add(0, unit, before)
    found, below = torch.zeros_like(importance), 0.0
    left = torch.ones(len(sizes), dtype=torch.bool)
    for _ in range(int(MOST * len(sizes))):
        costs = _blend(importance, readers)
        first = int(torch.where(left, costs, torch.inf).argmin())
        below = max(below, float(costs[first]))
        found[first], left[first] = below, False
        for reader in readers:
            reader.remove(first)
    found[left] = _blend(importance, readers)[left].clamp(min=below)
    total = float(found.sum())
    return (found / sizes)[unit] * (float(before.sum()) / total) if total > 0 else before


def _blend(importance: Tensor, readers: list[_Reader]) -> Tensor:
    costs = torch.stack([reader.costs(len(importance)) for reader in readers]).sum(0)
    return (importance * costs.clamp(min=0)).sqrt()


def _readers(model: nn.Module, group: ChannelGroup, unit: Tensor, moments: Mapping[str, Moments],
             normalized_by: Mapping[str, str]) -> list[_Reader]:
    found = []
    for name in dict.fromkeys(member.layer for member in group.role("consumer")):
        layer = model.get_submodule(name)
        if name not in moments or not _is_plain(layer) or len(moments[name].index) != getattr(layer, "groups", 1):
            continue  # also one that reads too many inputs for moments of them together
        seen = moments[name]
        units = torch.full((seen.index.numel(),), -1, dtype=torch.int64)
        for member in group.role("consumer"):
            if member.layer == name:
                units[member.index] = unit[member.channel]
        weights = _weights(layer, seen.index, _scale(model, normalized_by.get(name)))
        covariance = seen.covariance
        total = float(((weights @ covariance) * weights).sum())
        for weight, block, index in zip(weights, covariance, seen.index, strict=True):
            mine = units[index[0]]
            if total > 0 and bool((mine >= 0).any()):
                own = block.diagonal()
                inverse = torch.linalg.inv(block + torch.diag(RIDGE * own + NOISE * own.max().clamp(min=1e-30)))
                found.append(_Reader(inverse, _short(weight) / total ** 0.5, mine.clone()))
    return found


def _short(weight: Tensor) -> Tensor:
    """A weight of no more rows than inputs, [K, K] at most, by which inputs cost what they do by `weight`."""
    if len(weight) <= weight.shape[1]:
        return weight.clone()
    squared, vectors = torch.linalg.eigh(weight.t() @ weight)
    short: Tensor = squared.clamp(min=0).sqrt()[:, None] * vectors.t()
    return short


def _is_plain(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and \
        (isinstance(layer, nn.modules.conv._ConvNd) or (isinstance(layer, nn.Linear) and weight.dim() == 2))


def _scale(model: nn.Module, norm: str | None) -> Tensor | None:
    """float64 [outputs]: what a BatchNorm multiplies outputs by."""
    if norm is None:
        return None
    layer: Any = model.get_submodule(norm)
    if layer.running_var is None:
        return None
    scale: Tensor = (layer.running_var.double() + layer.eps).rsqrt()
    return scale if layer.weight is None else scale * layer.weight.detach().double()


def _weights(layer: Any, index: Tensor, scale: Tensor | None) -> Tensor:
    """float64 [G, rows, K] on the CPU: what each block makes of its inputs, at every place and kernel position."""
    weight: Tensor = layer.weight.detach().double()
    blocks = len(index)
    if isinstance(layer, nn.Linear):
        weight = weight if scale is None else weight * scale[:, None]
        return weight[:, index[0].to(weight.device)].flatten(0, 1)[None].cpu()
    if layer.transposed:  # [G·K, out / G, ...]
        weight = weight.unflatten(0, (blocks, -1)).transpose(1, 2)
    else:
        weight = weight.unflatten(0, (blocks, -1))  # [G, out / G, K, ...]
    if scale is not None:
        weight = weight * scale.reshape(blocks, -1, *[1] * (weight.dim() - 2))
    return weight.movedim(2, -1).flatten(1, -2).cpu()
