"""Random numbers that a model draws in evaluation mode, as many as there are channels: what draws them goes, too."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy, sums

import fastscore
from fastscore.graph.tracing import trace
from fastscore.graph.trials.steady_draws import SteadyDraws

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


class Drawing(nn.Module):
    """draw: what becomes of what a layer made."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 6), nn.Linear(6, 2)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.draw(self.b(self.draw(self.a(x).relu())).relu()).mean((2, 3))
        return self.last(self.c(x).relu())


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3, training=True),
    "dropout of channels": lambda x: F.dropout2d(x, 0.3, training=True),
    "dropout as one operation": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "noise": lambda x: x + 0.3 * torch.randn_like(x),
    "noise in place": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "a mask": lambda x: x * (torch.rand(x.shape, dtype=x.dtype) > 0.3),
}


@pytest.mark.parametrize("kind", list(DRAWS))
def test_what_draws_goes(kind: str) -> None:
    """Where all draws are alike, scores are those of brute force, and the smaller model is the masked one."""
    model = noisy(lambda: Drawing(DRAWS[kind]))
    graph = trace(model, X)
    assert [group.name for group in graph.groups] == ["a", "b", "c"], graph.skipped
    v = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    with SteadyDraws():
        scores = fastscore.score(model, [X], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, batch: (output * v).sum())
        for group in graph.groups:
            exact = sums(model, group, X, v).square().mean(0)
            torch.testing.assert_close(scores[group.name].double(), exact, rtol=1e-5, atol=1e-9 * float(exact.max()))
        small = fastscore.prune(model, scores, X, channels=0.5, scope="layer", compensate=False).model
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, scope="layer", compensate=False):
            torch.testing.assert_close(small(X), model(X))


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "in an order that is drawn": lambda x: x[:, torch.randperm(x.shape[1])],
    "by what is drawn": lambda x: x[:, torch.rand(x.shape[1]).argsort()],
    "about what was made": lambda x: torch.normal(x, 0.3)}  # of which autograd has no gradient


@pytest.mark.parametrize("kind", list(KEPT))
def test_what_draws_mix_is_kept(kind: str) -> None:
    assert [group.name for group in trace(noisy(lambda: Drawing(KEPT[kind])), X).groups] == ["c"]
