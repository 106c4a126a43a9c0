"""Patches of images, F.unfold and nn.Fold: a channel becomes as many as a patch has places, side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import whole_way
from torch import Tensor, nn


class Patches(nn.Module):
    """As tokens, which a Linear reads; as many as each has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.read = nn.Conv2d(3, 4, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.unfold(self.made(x), 2, stride=2).transpose(1, 2)).mean(1)


class Windows(nn.Module):
    """That overlap, and are padded, which a Conv1d reads."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.unfold, self.read = nn.Conv2d(3, 4, 3), nn.Unfold((2, 1), padding=1), nn.Conv1d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.unfold(self.made(x).relu()).sin()).mean(2)


class Folded(nn.Module):
    """Patches put together."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.fold, self.read = nn.Conv1d(3, 16, 1), nn.Fold((8, 6), 2, stride=2), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.fold(self.made(x)).sin()).mean((2, 3))


@pytest.mark.parametrize(("build", "shape"), [(Patches, (2, 3, 10, 10)), (Windows, (2, 3, 5, 6)), (Folded, (2, 3, 12))])
def test_channels_go_with_all_their_places_in_patches(build: Callable[[], nn.Module], shape: tuple[int, ...],
                                                      tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole_way.check(build, x, ["made"], tmp_path)
