"""How far two rankings of the same channels agree."""

from collections.abc import Mapping

import torch
from torch import Tensor


def flat(scores: Mapping[str, Tensor]) -> Tensor:
    """Every channel's importance in one row, groups in their order: float64 [C]."""
    return torch.cat([values.double() for values in scores.values()])


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two importances [C]; ties in order of channel."""
    ranks = torch.stack([values.argsort(stable=True).argsort() for values in (one, other)])
    return float(torch.corrcoef(ranks.double())[0, 1])


def overlap(one: Tensor, other: Tensor, fraction: float) -> float:
    """The share that both would prune, among the `fraction` of lowest importances [C] that each would."""
    count = max(1, round(fraction * len(one)))
    first, second = (set(values.argsort(stable=True)[:count].tolist()) for values in (one, other))
    return len(first & second) / count
