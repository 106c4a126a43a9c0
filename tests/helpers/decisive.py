"""A network that is decisive about its images, and one that lost channels: to distil."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastscore

QUIET: dict[str, Any] = {"progress": False}


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    """With everything that has a state or draws random numbers, BatchNorm and dropout; decisive about IMAGES."""
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                              nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, 5))
        model[9].weight.data *= 10
        with torch.no_grad():
            for _ in range(30):
                model(IMAGES)  # statistics that are those of the images
        return model.eval()

    return seeded(make, seed)


IMAGES = seeded(lambda: torch.randn(96, 3, 6, 6) + 2 * torch.randn(96, 3, 1, 1), 7)


def pruned() -> tuple[nn.Module, fastscore.PruneResult]:
    model = network()
    scores = fastscore.score(model, IMAGES.split(32), **QUIET)
    return model, fastscore.prune(model, scores, IMAGES[:1], macs=0.4, compensate=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
