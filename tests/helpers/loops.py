"""Training loops to compare scores with: the plain one, and brute force in float64."""

from collections.abc import Callable
from typing import Any

import oracles
import torch
from networks import NETWORKS
from torch import Tensor, nn

from fastscore import Scorer, Scores

RESIDUAL = NETWORKS["residual"]


def assert_same(one: Scores, other: Scores, tolerance: float = 1e-6) -> None:
    assert list(one) == list(other)
    for layer in one:
        assert float((one[layer] - other[layer]).abs().max()) <= tolerance * float(other[layer].max()), layer


def measured(model: nn.Module, *parts: Tensor, **options: Any) -> Scores:
    """The plain loop: one squared loss for each part."""
    scorer = Scorer(model, parts[0], **options)
    with scorer:
        for part in parts:
            model(part).square().sum().backward()
    model.zero_grad()
    return scorer.scores()


def brute_force(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """taylor-sq, normalised, of a model whose output is one tensor: mean over samples of (s / length)²."""
    z = model(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(loss(z), z)
    length = v.flatten(1).norm(dim=1, keepdim=True)
    return {name: (oracles.sums(model, group, x, v) / length).square().mean(0)
            for name, group in RESIDUAL.groups.items()}


def assert_exact(scores: Scores, exact: dict[str, Tensor], prefix: str = "") -> None:
    for name, values in exact.items():
        torch.testing.assert_close(scores[prefix + name].double(), values, rtol=1e-6, atol=0)
