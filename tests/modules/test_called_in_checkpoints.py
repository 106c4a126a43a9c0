"""Layers that code runs by functions of their parameters inside of an activation checkpoint, which runs the code again
in the backward pass, by itself: scored beside a training as without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from whole_way import noisy, sums

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(3, 3, 7, 7, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """reentrant: which kind of checkpoint; None: none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.norm, self.reentrant = nn.BatchNorm2d(8), reentrant

    def middle(self, x: Tensor) -> Tensor:
        """What is run again."""
        return self.norm(F.conv2d(x, self.b.weight, self.b.bias)).relu()

    def forward(self, x: Tensor) -> Tensor:
        for part in (lambda x: self.a(x).relu(), self.middle, self.c):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return self.last(x.relu().mean((2, 3)))


V = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("reentrant", [False, True])
def test_beside_a_training(reentrant: bool) -> None:
    model, plain, x = noisy(lambda: Net(reentrant)), noisy(lambda: Net(None)), X.clone().requires_grad_()
    with fastscore.Scorer(model, X, normalize=False) as scorer:
        (model(x) * V).sum().backward()
    scores, groups = scorer.scores(), trace(plain, X).groups
    assert set(scores) == {"a", "b", "c"} == {group.name for group in groups}
    for group in groups:
        torch.testing.assert_close(scores[group.name].double(), sums(plain, group, X, V).square().mean(0), rtol=1e-5,
                                   atol=1e-12)
    (plain(X) * V).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_scored(reentrant: bool) -> None:
    one, other = (fastscore.score(noisy(lambda kind=kind: Net(kind)), [X], progress=False)
                  for kind in (reentrant, None))
    for name in other:
        assert torch.equal(one[name], other[name])
