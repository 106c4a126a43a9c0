"""Random numbers that a model draws in evaluation mode, as many as there are channels: what draws them goes, too."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy, sums

import fastscore
from fastscore.graph.tracing import trace
from fastscore.graph.trials.draws import SteadyDraws

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


class Noisy(nn.Linear):
    """A layer that draws by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(self.out_features, dtype=x.dtype)


class Drawing(nn.Module):
    """draw: what becomes of what a layer made. kind: of a layer that may draw, too."""

    def __init__(self, draw: Callable[[Tensor], Tensor], kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), kind(6, 6), nn.Linear(6, 2)
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


@pytest.mark.filterwarnings("ignore:Drawing draws")
@pytest.mark.parametrize("kind", [*DRAWS, "a layer"])
def test_what_draws_goes(kind: str) -> None:
    """Where all draws are alike, scores are those of brute force, and the smaller model is the masked one."""
    model = noisy(lambda: Drawing(DRAWS.get(kind, torch.tanh), nn.Linear if kind in DRAWS else Noisy))
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


class Within(nn.Module):
    """after: a module between the layers."""

    def __init__(self, after: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.after, self.last = nn.Linear(3, 8), nn.Sequential(nn.ReLU(), after), last
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.after(self.first(x))).relu())


class Left(nn.Module):
    """Its code draws; shows: whether that changes anything."""

    def __init__(self, shows: bool) -> None:
        super().__init__()
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.rand(())
        return x * drawn if self.shows else x


WHERE = {
    "dropout that stays on": (Within(Left(True), nn.Linear(8, 6)), r"in evaluation mode, in after\.1 \(Left\) \("),
    "two modules": (Within(Left(True), Noisy(8, 6)), r"in after\.1 \(Left\), last \(Noisy\) \("),
    "a layer": (Within(Noisy(8, 8), nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6))),
                r"in after\.1 \(Noisy\) \("),
    "the model itself": (Drawing(DRAWS["noise"]), r"^Drawing draws random numbers in evaluation mode \(dropout"),
}


@pytest.mark.parametrize("kind", list(WHERE))
def test_who_draws_is_named_once(kind: str) -> None:
    model, message = WHERE[kind]
    x = X if isinstance(model, Drawing) else X[0, :, 0].T.contiguous()
    model.double().eval()
    for made in (lambda: fastscore.score(model, [x], progress=False), lambda: fastscore.Scorer(model, x)):
        with pytest.warns(UserWarning, match="random numbers") as warned:
            made()
        (said,) = {str(each.message) for each in warned if "random numbers" in str(each.message)}
        assert re.search(message, said)


@pytest.mark.parametrize("model", [Within(Left(False), nn.Linear(8, 6)), Within(nn.Dropout(), nn.Linear(8, 6))])
def test_what_shows_nowhere_is_not_spoken_of(model: nn.Module) -> None:
    x = X[0, :, 0].T.contiguous()
    model.double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastscore.score(model, [x], progress=False)
        fastscore.Scorer(Within(Left(True), nn.Linear(8, 6)).double().train(), x)
