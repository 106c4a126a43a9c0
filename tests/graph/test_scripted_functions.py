"""Functions that torch.jit.script has compiled, in the code of models that it has not."""

from pathlib import Path

import torch
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace


@torch.jit.script
def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


@torch.jit.script
def gate_at(x: Tensor, half: int) -> Tensor:
    return torch.tanh(x[:, :half]) * torch.sigmoid(x[:, half:])


class Gated(nn.Module):
    """As WaveNets have it that VITS and WaveGlow are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.then, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(4, 6, 1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.then(self.gated(self.both(x))).tanh()).mean(-1)

    def gated(self, x: Tensor) -> Tensor:
        return gate(x)


class GatedAt(Gated):
    """At a place that it says: what the code of such a function cuts by, nobody sees."""

    def gated(self, x: Tensor) -> Tensor:
        return gate_at(x, 4)


def _sound() -> Tensor:
    return torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_halves_lose_channels(tmp_path: Path) -> None:
    check(Gated, _sound(), ["both", "then"], tmp_path)


def test_halves_at_a_place_stay_and_the_rest_goes(tmp_path: Path) -> None:
    check(GatedAt, _sound(), ["then"], tmp_path)
    assert "at positions that the model's code fixes" in trace(noisy(GatedAt), _sound()).skipped["both"]
