"""Layers and normalisations that code calls by keyword are what they are by position."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace


class RMSNorm(nn.Module):
    """As transformers has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(1 + 0.3 * torch.randn(width)), 1e-3

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> the same."""
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale


class Tokens(nn.Module):
    """A residual stream, called either way."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (nn.Linear(*widths) for widths in ((5, 8), (8, 6), (6, 8), (8, 3)))
        self.norm, self.last, self.by_keyword = nn.LayerNorm(8), RMSNorm(8), by_keyword

    def call(self, module: nn.Module, x: Tensor, keyword: str = "input") -> Tensor:
        """module(x)"""
        return module(**{keyword: x}) if self.by_keyword else module(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 5] -> [N, T, 3]."""
        x = self.call(self.embed, x)
        x = x + self.call(self.down, F.gelu(self.call(self.up, self.call(self.norm, x))))
        return self.call(self.head, self.call(self.last, x, "hidden_states"))


class Images(Tokens):
    """A BatchNorm that is folded, and an up-sampling that a tap may stand before."""

    def __init__(self, by_keyword: bool, flip: bool = False) -> None:
        super().__init__(by_keyword)
        self.embed, self.up, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.larger, self.flip = nn.BatchNorm2d(8), nn.Upsample(scale_factor=2), flip

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4, 2 H, 2 W]."""
        x = self.call(self.larger, F.relu(self.call(self.norm, self.call(self.embed, x))))
        x = x.flip(1) if self.flip else x
        return self.call(self.head, F.relu(self.call(self.up, x)))


@pytest.mark.parametrize(("build", "shape", "groups"), [(Tokens, (4, 6, 5), ["embed", "up"]),
                                                        (Images, (4, 3, 4, 4), ["embed", "up"])])
def test_scores_and_smaller_models_are_the_same(build: Any, shape: tuple[int, ...], groups: list[str]) -> None:
    """Repaired, too."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for by_keyword in (True, False):
        torch.manual_seed(0)
        model = build(by_keyword).double().eval()
        scores = fastscore.score(model, [x], progress=False)
        pruned = [fastscore.prune(model, scores, x, channels=0.6, progress=False, **how).model
                  for how in ({"compensate": False}, {"calibration": [x] * 2})]
        with torch.no_grad():
            found.append((scores, [small(x) for small in pruned]))
            with fastscore.mask(model, scores, 0.4, x, compensate=False):
                torch.testing.assert_close(model(x), found[-1][1][0])
    (scores, outputs), (expected, expected_outputs) = found
    assert list(scores) == list(expected) == groups
    for layer in groups:
        torch.testing.assert_close(scores[layer], expected[layer])
    for output, wanted in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(output, wanted)


def test_what_moves_is_seen() -> None:
    """Whether a layer reads what its group says is looked at, however it is called."""
    graph = trace(Images(True, flip=True).eval(), torch.randn(2, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["up"]
    assert "the tracer cannot follow its channels to up" in graph.skipped["embed"]
