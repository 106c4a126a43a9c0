"""Channels of several layers whose number a module keeps once, and cuts them by: they go as one, as WaveNet's stream,
what it skips and its gates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

N, LAYERS = 6, 3
X = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0)).double()


class Gates(nn.Module):
    """As WaveGlow's WN: a gate of two halves, of which one layer makes what goes on, and what is added to the output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_channels = N
        self.into = nn.ModuleList(nn.Conv1d(N, 2 * N, 3, padding=1) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Conv1d(N, N if last else 2 * N, 1) for last in (False, False, True))

    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y[:, :self.n_channels], y[:, self.n_channels:]

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for into, out in zip(self.into, self.out, strict=True):
            a, b = self.halves(into(x))
            made = out(a.tanh() * b.sigmoid())
            if out is not self.out[-1]:
                more, made = self.halves(made)
                x = x + more
            output = output + made
        return output


class Normed(Gates):
    """As users have it, with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (*self.into, *self.out):
            nn.utils.parametrizations.weight_norm(layer)


class Local(Gates):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        n = self.n_channels
        return y[:, :n], y[:, n:2 * n]


class Net(nn.Module):
    def __init__(self, gates: Callable[[], nn.Module] = Gates) -> None:
        super().__init__()
        self.start, self.gates, self.end = nn.Conv1d(2, N, 1), gates(), nn.Conv1d(N, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.gates(self.start(x)).relu()).mean(2)


class Scaled(Gates):
    """Their number is a factor as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.n_channels


@pytest.mark.parametrize("gates", [Gates, Local, Normed])
def test_they_go_as_one(gates: type[Gates], tmp_path: Path) -> None:
    small = check(lambda: Net(gates), X, ["start"], tmp_path).model
    assert small.gates.n_channels == small.gates.out[-1].out_channels == N // 2


def test_a_number_that_is_more_than_a_width_keeps_them() -> None:
    graph = trace(noisy(lambda: Net(Scaled)), X)
    assert not graph.groups
    assert "start" in graph.skipped
