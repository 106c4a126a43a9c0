"""From per-sample sums s[n, c] to the importance of a channel: one row for each criterion.

s[n, c] = Σ activation x gradient over the consumer edges of a group: the first-order change of v_n·z_n when the
channel goes (Molchanov et al., arXiv 1611.06440; random v: arXiv 2310.20203).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastscore import ops
from fastscore.groups import ChannelGroup, Member
from fastscore.taps import Measure


@dataclass(frozen=True)
class GradientImportance:
    """measure: what a tap sends, [N, C]. per_sample: its share of the running total. finish: mean -> importance.

    degree: the power of the output gradient's length in `measure`; dividing by it normalises.
    """

    measure: Measure
    per_sample: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    degree: int = 1


def _same(x: Tensor) -> Tensor:
    return x


GRADIENT_IMPORTANCES: dict[tuple[str, str], GradientImportance] = {
    # (importance, reduction)
    ("taylor", "sum"): GradientImportance(ops.channel_dot, _same, torch.abs),
    ("taylor-abs", "sum"): GradientImportance(ops.channel_dot, torch.abs, _same),
    ("taylor-sq", "sum"): GradientImportance(ops.channel_dot, torch.square, _same),
    ("taylor-abs", "element"): GradientImportance(lambda a, g, dim: ops.channel_powers(a, g, dim)[0], _same, _same),
    ("taylor-sq", "element"): GradientImportance(lambda a, g, dim: ops.channel_powers(a, g, dim)[1], _same, _same, 2),
}

# (model, group, seed) -> [C]; None where the criterion says nothing about the group
WeightImportance = Callable[[nn.Module, ChannelGroup, int], Tensor | None]


def _filter_norm(p: int) -> WeightImportance:
    """The p-norm of all the weights that make a channel, over all its producers and depthwise convolutions."""

    def importance(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members:
            layer = model.get_submodule(member.layer)
            if member.role != "consumer" and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                total += _joint(group, member, _filters(layer).abs().pow(p).sum(1))
        return total.pow(1 / p)

    return importance


def _bn_scale(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """The mean |γ| of the BatchNorms that the group's channels pass (Liu et al., arXiv 1708.06519)."""
    scales = []
    for member in group.role("channelwise"):
        layer = model.get_submodule(member.layer)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            scale = layer.weight.detach().double().abs().cpu()
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

NAMES = tuple(dict.fromkeys([name for name, _ in GRADIENT_IMPORTANCES] + list(WEIGHT_IMPORTANCES)))


def gradient_importance(importance: str, reduction: str) -> GradientImportance:
    """The row for (importance, reduction). Raises ValueError for a pair that is not in the table."""
    row = GRADIENT_IMPORTANCES.get((importance, reduction))
    if row is None:
        if importance not in NAMES:
            raise ValueError(f"importance: {importance!r} is none of {', '.join(NAMES)}")
        if importance in WEIGHT_IMPORTANCES:
            raise ValueError(f"importance: {importance!r} reads weights, no gradient and no positions to reduce: use "
                             "fastscore.score() without gradient= and reduction=")
        if reduction not in ("sum", "element"):
            raise ValueError(f"reduction: {reduction!r} is neither 'sum' nor 'element'")
        raise ValueError(f"reduction: {importance!r} has no reduction {reduction!r}")
    return row


def _filters(layer: nn.Module) -> Tensor:
    """The weights of each output channel: float64 [C, everything else], on the CPU."""
    weight = layer.get_parameter("weight").detach().double().cpu()
    if getattr(layer, "transposed", False):  # [in, out / groups, ...]
        groups = layer.groups
        assert isinstance(groups, int)
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _joint(group: ChannelGroup, member: Member, values: Tensor) -> Tensor:
    """Values of a layer's positions -> their sum for each channel of the group, tied channels as one, [C]."""
    units = torch.zeros(group.channels, dtype=values.dtype)
    return units.index_add_(0, group.unit[member.channel], values[member.index])[group.unit]
