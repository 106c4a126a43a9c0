"""From per-sample sums s[n, c] to the importance of a channel: one row for each criterion.

s[n, c] = Σ activation x gradient over the consumer edges of a group: the first-order change of v_n·z_n when the
channel goes (Molchanov et al., arXiv 1611.06440; random v: arXiv 2310.20203).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore.scoring.weights import WEIGHT_IMPORTANCES
from fastscore.taps.measures import POWERS, SUMS, Measure


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

REDUCTIONS, ABLATIONS = ("sum", "element"), ("zero", "mean")

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
    for name, value, known in (("reduction", reduction, REDUCTIONS), ("ablation", ablation, ABLATIONS)):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is neither {known[0]!r} nor {known[1]!r}")
    choices = " and ".join(f"reduction={r!r}, ablation={a!r}" for n, r, a in GRADIENT_IMPORTANCES if n == importance)
    raise ValueError(f"reduction, ablation: {importance!r} has no {reduction!r} with {ablation!r}; it has {choices}")
