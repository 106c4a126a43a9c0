"""From per-sample sums s[n, c] to the importance of a channel: one row for each criterion.

s[n, c] = Σ activation x gradient over the consumer edges of a group: the first-order change of v_n·z_n when the
channel goes (Molchanov et al., arXiv 1611.06440; random v: arXiv 2310.20203).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastscore import ops
from fastscore.graph import heads
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.taps.gates import Measure


def _sums(a: Tensor, g: Tensor, channel_dim: int) -> Tensor:
    return _with_mean(a, *ops.channel_sums(a, g, channel_dim))


def _clamped_sums(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
    gradient, *sums = ops.clamp_backward(y, g, rest, low, high, overwrite=True)
    return gradient, _with_mean(y, *sums)


def _with_mean(a: Tensor, dot: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    return torch.stack([dot, total.div_(max(a.numel() // max(total.numel(), 1), 1)), gradient])


def _powers(a: Tensor, g: Tensor, channel_dim: int) -> Tensor:
    return torch.stack(ops.channel_powers(a, g, channel_dim))


SUMS = Measure(3, _sums, mean=1, fused=_clamped_sums)  # Σ a·g, the mean of a, Σ g
POWERS = Measure(2, _powers)  # Σ |a·g|, Σ (a·g)²
DEGREES = {SUMS: (1, 0, 1), POWERS: (1, 2)}  # the power of the output gradient's length in each part
MEAN = 1  # the part of SUMS that holds activations


@dataclass(frozen=True)
class GradientImportance:
    """How s becomes an importance: sums of it are taken over samples, and the mean over samples is finished.

    accumulate: float64 [V, N, U] -> [..., U], the share of N samples; V is 1, or, where `edges`, 1 + 2E: s, then Σ g
    and the mean activation of each of E edges. finish: its mean [..., C] -> importance [C].
    measure, part: what the taps send, and which part of it is s. minibatch: N samples count as one, as a step of
    training would see them. filters: s is not read; the share of a minibatch comes from its weight gradients.
    """

    accumulate: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor] = lambda mean: mean
    measure: Measure = SUMS
    part: int = 0
    edges: bool = False
    minibatch: bool = False
    filters: bool = False


def _gram(values: Tensor) -> Tensor:
    """[1 + 2E, N, U] -> [2 + E, 1 + E, U]: products of (s, Σ g of each edge) among each other; then (0, the means)."""
    edges = len(values) // 2
    terms = values[:1 + edges]
    means = torch.cat([torch.zeros_like(values[:1]), values[1 + edges:]]).sum(1)
    return torch.cat([torch.einsum("anu,bnu->abu", terms, terms), means[None]])


def _ablated_to_mean(mean: Tensor) -> Tensor:
    """The mean of (s - Σ_e μ_e·Σ g_e)², from what `_gram` has summed: exact for the means μ known only at the end."""
    weights = torch.cat([torch.ones_like(mean[-1, :1]), -mean[-1, 1:]])
    # never negative but for rounding
    return torch.einsum("au,abu,bu->u", weights, mean[:-1], weights).clamp(min=0)


GRADIENT_IMPORTANCES: dict[tuple[str, str, str], GradientImportance] = {
    # (importance, reduction, ablation)
    ("taylor", "sum", "zero"): GradientImportance(lambda v: v[0].sum(0), torch.abs),
    ("taylor-abs", "sum", "zero"): GradientImportance(lambda v: v[0].abs().sum(0)),
    ("taylor-sq", "sum", "zero"): GradientImportance(lambda v: v[0].square().sum(0)),
    ("taylor-sq", "sum", "mean"): GradientImportance(_gram, _ablated_to_mean, edges=True),
    ("taylor-abs", "element", "zero"): GradientImportance(lambda v: v[0].sum(0), measure=POWERS),
    ("taylor-sq", "element", "zero"): GradientImportance(lambda v: v[0].sum(0), measure=POWERS, part=1),
    # Molchanov et al., arXiv 1906.10771: γ·∂γ + β·∂β = Σ a·g at the output of the BatchNorm
    ("molchanov-bn", "sum", "zero"): GradientImportance(lambda v: v[0].sum(0).square(), minibatch=True),
    ("molchanov-group", "sum", "zero"): GradientImportance(lambda v: v[0].sum(0), minibatch=True, filters=True),
}

# (model, group, seed) -> [C]; None where the criterion says nothing about the group
WeightImportance = Callable[[nn.Module, ChannelGroup, int], Tensor | None]


def _filter_norm(p: int) -> WeightImportance:
    """The p-norm of all the weights that make a channel, over all its producers and depthwise convolutions."""

    def importance(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member, name in filter_parameters(model, group):
            if not name.endswith("bias"):
                weight = model.get_parameter(name).detach().double().cpu()
                total += _joint(group, member, _by_position(model, member, name, weight).abs().pow(p).sum(1))
        return total.pow(1 / p)

    return importance


def _bn_scale(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """The mean |γ| of the BatchNorms that the group's channels pass (Liu et al., arXiv 1708.06519)."""
    scales = []
    for member in group.role("channelwise", "gate"):
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

LAYERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    # [C] -> [C], so that layers compare
    "none": lambda values: values,
    "l2": lambda values: values / values.norm().clamp(min=torch.finfo(values.dtype).tiny),
    "mean": lambda values: values / values.mean().clamp(min=torch.finfo(values.dtype).tiny),
}

NAMES = tuple(dict.fromkeys([name for name, _, _ in GRADIENT_IMPORTANCES] + list(WEIGHT_IMPORTANCES)))


def gradient_importance(importance: str, reduction: str = "sum", ablation: str = "zero") -> GradientImportance:
    """The row for (importance, reduction, ablation). Raises ValueError for one that is not in the table."""
    row = GRADIENT_IMPORTANCES.get((importance, reduction, ablation))
    if row is not None:
        return row
    if importance not in NAMES:
        raise ValueError(f"importance: {importance!r} is none of {', '.join(NAMES)}")
    if importance in WEIGHT_IMPORTANCES:
        raise ValueError(f"importance: {importance!r} reads weights, no gradient and no positions to reduce: use "
                         "fastscore.score() without gradient=, reduction= and ablation=")
    for name, value, known in (("reduction", reduction, ("sum", "element")), ("ablation", ablation, ("zero", "mean"))):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is neither {known[0]!r} nor {known[1]!r}")
    choices = " and ".join(f"reduction={r!r}, ablation={a!r}" for n, r, a in GRADIENT_IMPORTANCES if n == importance)
    raise ValueError(f"reduction, ablation: {importance!r} has no {reduction!r} with {ablation!r}; it has {choices}")


def filter_products(model: nn.Module, group: ChannelGroup, gradients: Mapping[str, Tensor]) -> Tensor:
    """Σ (w·∂w)² over the weights of the filters that make each channel, and (b·∂b)²: float64 [C].

    gradients: qualified name of a parameter -> its gradient. Source: Molchanov et al., arXiv 1906.10771.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member, name in filter_parameters(model, group):
        if name in gradients:
            product = model.get_parameter(name).detach().double() * gradients[name]
            total += _joint(group, member, _by_position(model, member, name, product.cpu()).square().sum(1))
    return total


def filter_parameters(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Member, str]]:
    """(layer, qualified name of a weight or bias) of everything that makes the group's channels: Conv, Linear, and the
    projections that an attention module holds itself."""
    for member in group.role("producer", "channelwise", "heads"):
        layer = model.get_submodule(member.layer)
        own = heads.PROJECTIONS if member.role == "heads" else \
            ("weight", "bias") if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) else ()
        for name, parameter in layer.named_parameters(recurse=False):
            if name in own and parameter is not None:
                yield member, f"{member.layer}.{name}"


def _by_position(model: nn.Module, member: Member, name: str, values: Tensor) -> Tensor:
    """Values of the shape of the parameter called `name` -> a row for each position (or head) of the member."""
    if member.role == "heads":
        return heads.by_head(name.rpartition(".")[2], values, len(member.index))
    return _by_output(model.get_submodule(member.layer), values) if values.dim() > 1 else values[:, None]


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight of `layer`, or something of its shape, with a row for each output channel: [C, everything else]."""
    if getattr(layer, "transposed", False):  # [in, out / groups, ...]
        groups = layer.groups
        assert isinstance(groups, int)
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _joint(group: ChannelGroup, member: Member, values: Tensor) -> Tensor:
    """Values of a layer's positions -> their sum for each channel of the group, tied channels as one, [C]."""
    units = torch.zeros(group.channels, dtype=values.dtype)
    return units.index_add_(0, group.unit[member.channel], values[member.index])[group.unit]
