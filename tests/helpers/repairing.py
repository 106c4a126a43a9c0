"""Networks to cut and repair."""

import copy
from functools import lru_cache

from networks import NETWORKS
from torch import Tensor, nn

import fastscore


def scored(name: str) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    """One of NETWORKS, three batches of eight, and its scores on them."""
    model, batches, scores = _scored(name)
    return copy.deepcopy(model), list(batches), scores


@lru_cache
def _scored(name: str) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    model, x = NETWORKS[name].model(), NETWORKS[name].inputs(24)
    batches = list(x.split(8))
    return model, batches, fastscore.score(model, batches, ablation="mean", progress=False)
