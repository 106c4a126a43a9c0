"""Channels that go together though nothing leads from one to the other: those of a max-unpooling with the pool's."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class SegNet(nn.Module):
    """What is pooled on the way down is put back to the same places on the way up, by the places of the maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.up, self.fine = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x, wide = self.pool(self.down(x).relu())
        x, narrow = self.pool(self.deep(x).relu())
        x = self.unpool(self.up(self.unpool(x, narrow)).relu(), wide)
        return self.out(self.fine(x).relu())


class Lines(nn.Module):
    """The same of one dimension, which PyTorch pools as two."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool1d(self.down(x.flatten(2)).relu(), 2, return_indices=True)
        return self.out(F.max_unpool1d(self.up(x).relu(), places, 2))


def test_what_is_put_where_maxima_were_goes_with_them(tmp_path: Path) -> None:
    check(SegNet, X, ["down", "deep", "fine"], tmp_path)
    check(Lines, X, ["down"], tmp_path)
