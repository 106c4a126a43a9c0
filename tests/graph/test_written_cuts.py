"""Cuts and zeros of widths that stand in a module's code: `torch.split(x, 4, dim=1)`, `torch.zeros(len(x), 4)`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace


class Cell(nn.Module):
    """A ConvLSTM's, whose width stands in its code."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs + 4, 16, 3, padding=1)

    def begin(self, samples: int, width: int, side: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return (torch.zeros(samples, width, *side, dtype=self.conv.weight.dtype),
                torch.zeros(samples, width, *side, dtype=self.conv.weight.dtype))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), 4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Video(nn.Module):
    """Zeros of a number in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = Cell(2), nn.Conv2d(4, 3, 1)

    def zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, _, _, h, w = x.shape
        return x.new_zeros(n, 4, h, w), x.new_zeros(n, 4, h, w)

    def forward(self, x: Tensor) -> Tensor:
        state = self.zeros(x)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state[0]).mean((2, 3))


class HandsItOn(Video):
    """It tells its cell."""

    def zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell.begin(len(x), 4, (5, 6))


class OwnMethod(Video):
    """It tells itself, an image of whose own is as wide."""

    def make(self, samples: int, width: int) -> tuple[Tensor, Tensor]:
        dtype = self.last.weight.dtype
        return torch.zeros(samples, width, 4, 4, dtype=dtype), torch.zeros(samples, width, 4, 4, dtype=dtype)

    def zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.make(len(x), 4)


class Square(Video):
    """One number is the width and the sides of its images."""

    def zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x), 4, 4, 4), x.new_zeros(len(x), 4, 4, 4)


class Sliced(nn.Module):
    """Half of what a layer makes gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Conv1d(3, 16, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return self.last((y[:, :8].tanh() * y[:, 8:].sigmoid()).mean(-1))


class ByChance(Sliced):
    """A number of its code is as large as what it computes of another."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 8

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        y = y[:, :self.half].tanh() * y[:, self.half:].sigmoid()
        return self.last(y.mean(-1)) * (2 if len(x) > 8 else 1)


class OfNoMore(Sliced):
    """Another number, by which fewer samples come back than it says, in the line of its cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 100

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return self.last((y[:self.most, :8].tanh() * y[:self.most, 8:].sigmoid()).mean(-1))


class ChosenInItsLine(Sliced):
    """It cuts places, too, of longer sounds than the example, in the line where it cuts channels."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return self.last((y[:, :8] * (y if x.shape[2] < 9 else y[:, :, :8].exp())[:, 8:].mean(-1, True)).mean(2))


class LoopInItsLine(ByChance):
    """The same, in a loop there."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        half = self.half
        y = y[:, :half] * y[:, half:] + sum(z[:, :, :half].mean() for z in [y] * (x.shape[2] // 9))
        return self.last(y.mean(-1))


class Asks(Sliced):
    """It is compared with something, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        y = self.last((y[:, :8].tanh() * y[:, 8:].sigmoid()).mean(-1))
        return y if len(x) < 8 else 2 * y


class AsManySamples(Sliced):
    """It takes as many samples, where there are more."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return self.last((y[:8, :8].tanh() * y[:8, 8:].sigmoid()).mean(-1))


class InOneLine(Sliced):
    """The same, of a cut beside others in its line."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.both(x[:8])[:, :8].tanh() * self.both(x)[:8, 8:].sigmoid()).mean(-1))


class ZerosElsewhere(Sliced):
    """As many zeros lie along another dimension, where more samples than the example's are."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(torch.cat([x.new_zeros(len(x), 3, 8), x], 2) if len(x) > 9 else x)
        return self.last((y[:, :8].tanh() * y[:, 8:].sigmoid()).mean(-1))


def _video(*sides: int) -> Tensor:
    return torch.randn(2, 3, 2, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _sound() -> Tensor:
    return torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("way", [Video, HandsItOn, OwnMethod])
def test_cells_lose_units(way: type[nn.Module], tmp_path: Path) -> None:
    small = check(way, _video(4, 4) if way is OwnMethod else _video(5, 6), ["cell.conv"], tmp_path).model
    assert (small.cell.conv.in_channels, small.cell.conv.out_channels) == (2 + 2, 8)
    assert isinstance(small, way)


@pytest.mark.parametrize("way", [Sliced, ByChance, OfNoMore])
def test_gates_lose_channels(way: type[nn.Module], tmp_path: Path) -> None:
    assert check(way, _sound(), ["both"], tmp_path).model.both.out_channels == 8


@pytest.mark.parametrize(("way", "said"), [
    (Square, "the code of Square makes zeros of 4 channels that meet them, a number that is written there"),
    (AsManySamples, "8 of AsManySamples is the size of a view, cut or zeros, and something else in the code of "
                    "AsManySamples.forward (y[:8, :8])"),
    (InOneLine, "8 of InOneLine is the size of a view, cut or zeros, and something else in the code of InOneLine"),
    (ChosenInItsLine, "8 of ChosenInItsLine is the size of a view, cut or zeros, and something else in the code of "
                      "ChosenInItsLine.forward (y[:, :, :8])"),
    (LoopInItsLine, "half of LoopInItsLine is the size of a view, cut or zeros, and something else in the code of "
                    "LoopInItsLine.forward (z[:, :, :half])"),
    (ZerosElsewhere, "8 of ZerosElsewhere is the size of a view, cut or zeros, and something else in the code of "
                     "ZerosElsewhere.forward (x.new_zeros(len(x), 3, 8))"),
    (Asks, "8 of Asks is the size of a view, cut or zeros, and something else in the code of Asks.forward (len(x)")])
def test_numbers_of_two_uses_stay(way: type[nn.Module], said: str) -> None:
    graph = trace(noisy(way), _video(4, 4) if way is Square else _sound())
    assert not graph.groups
    assert graph.skipped["cell.conv" if way is Square else "both"].startswith(said)
