"""Networks to cut and repair."""

from functools import lru_cache

from networks import NETWORKS
from torch import Tensor, nn

import fastscore


def scored(name: str) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    """One of NETWORKS, three batches of eight, and its scores on them."""
    return NETWORKS[name].traced(), _batches(name), _scores(name)


def _batches(name: str) -> list[Tensor]:
    return list(NETWORKS[name].inputs(24).split(8))


@lru_cache
def _scores(name: str) -> fastscore.Scores:
    return fastscore.score(NETWORKS[name].traced(), _batches(name), ablation="mean", progress=False)
