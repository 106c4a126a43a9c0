"""Parameters that channels meet in branches that no example runs: mask tokens."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell where its instructions stand")
X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Masked(nn.Module):
    """Two streams of the same width; the first meets a token where some tokens are masked."""

    masked: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(*widths) for widths in ((4, 6), (6, 6), (6, 5), (5, 2)))
        self.token = nn.Parameter(torch.zeros(1, 6))

    def met(self, x: Tensor, masked: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        """[N, T, 4] -> [N, T, 2]."""
        x = self.one(x)
        masked = self.masked if masked is None else masked
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.token.to(x.dtype).unsqueeze(0), x)
        return self.last(self.three(self.two(x.relu()).relu()).relu())


class Added(Masked):
    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.one(x)
        if self.masked is not None:
            x = x + self.token
        return self.last(self.three(self.two(x.relu()).relu()).relu())


class Turned(Masked):
    """Channels meet those of others."""

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.one(x).flip(-1)
        if self.masked is not None:
            x = x + self.token
        return self.last(self.three(self.two(x.relu()).relu()).relu())


class Averaged(Masked):
    """It is read otherwise, too."""

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.one(x)
        if self.masked is not None:
            x = x + self.token * self.token.mean()
        return self.last(self.three(self.two(x.relu()).relu()).relu())


class Both(Masked):
    """Both streams meet it."""

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.one(x)
        if self.masked is not None:
            x = x + self.token
        x = self.two(x.relu())
        if self.masked is not None:
            x = x + self.token
        return self.last(self.three(x.relu()).relu())


class Read(Masked):
    """The output has it, too."""

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.one(x)
        if self.masked is not None:
            x = x + self.token
        return self.last(self.three(self.two(x.relu()).relu()).relu()) + self.token[..., :2]


def _offered(kind: type[Masked]) -> set[str]:
    """The layers whose channels go; what is left makes of masked tokens, too, what it made beside zeros."""
    model: Any = noisy(kind)
    scores = fastscore.score(model, [X], progress=False)
    options = {"scope": "layer", "compensate": False}
    small = fastscore.prune(model, scores, X, channels=0.5, **options).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, **options):
        for masked in (None, torch.arange(21).view(3, 7) % 3 == 0):
            model.masked = small.masked = masked
            torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=1e-9)
    model.masked = None
    return set(scores)


@pytest.mark.parametrize("kind", [Masked, Added])
def test_its_entries_go_with_the_channels_that_they_meet(kind: type[Masked], tmp_path: Path) -> None:
    assert _offered(kind) == {"one", "two", "three"}
    assert check(kind, X, ["one", "two", "three"], tmp_path).model.token.shape == (1, 3)


@pytest.mark.parametrize(("kind", "offered"), [
    (Turned, {"two", "three"}), (Averaged, {"two", "three"}), (Both, {"three"}), (Read, {"two", "three"})])
def test_where_they_meet_otherwise_channels_stay(kind: type[Masked], offered: set[str]) -> None:
    assert _offered(kind) == offered
