"""Attentions that choose tokens by layers that run without gradients, as sparse attention's indexers do: heads go,
and what both read."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check


class Indexed(nn.Module):
    """Each token attends to some, which other layers choose. after: what they choose gates what comes of it."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.low, self.one, self.two, self.three = (nn.Linear(8, width) for width in (8, 16, 16, 16))
        self.out, self.which, self.heads, self.after = nn.Linear(16, 8), nn.Linear(8, 6), 4, after

    def chosen(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            of = self.which(x)
            return (of @ of.mT).argsort(-1, descending=True).argsort(-1) < 3

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        chosen = 1 if self.after else self.chosen(low)[:, None]
        n, t, _ = x.shape
        a, b, c = (layer(y).view(n, t, self.heads, -1).transpose(1, 2)
                   for layer, y in ((self.one, low), (self.two, x), (self.three, x)))
        y = ((a @ b.mT / 2).softmax(-1) * chosen) @ c
        y = self.out(y.transpose(1, 2).flatten(2))
        return y * self.chosen(low).to(y.dtype).mean(-1, keepdim=True) if self.after else y


class Net(nn.Module):
    """[N, T, 4] -> [N, T, 3]."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(4, 8), Indexed(after), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x)).relu())


@pytest.mark.parametrize("after", [False, True])
def test_heads_go(after: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(lambda: Net(after), x, ["first", "attention.low", "attention.one", "attention.out"], tmp_path)
