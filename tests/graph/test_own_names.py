"""Attention whose code has names of its own for what its module keeps: `heads = self.heads`, and then `C // heads`."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check

from fastscore.graph.tracing import trace
from fastscore.modules.attention import own_width

WIDTH, HEADS = 12, 3


class Named(nn.Module):
    """The count of its heads has a name in its code, as in much that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h = self.heads
        q, k, v = self.to_qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Unpacked(Named):
    """It stands behind what is unpacked."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c, h = *x.shape, self.heads
        q, k, v = self.to_qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT * (c // h) ** -0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class TwoNames(Named):
    """So has the width of one; it keeps what it weighs by in a tuple that is empty first."""

    def forward(self, x: Tensor) -> Tensor:
        kept = ()
        b, n, c = x.shape
        h, half = self.heads, 2
        d = c // h
        q, k, v = (t.view(b, n, h, d).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        kept += ((q @ k.mT / half).softmax(-1),)
        x = kept[0] @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, h * d))


class SetAnew(Named):
    """A name that is set to something else stays what it is."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h = self.heads
        q, k, v = self.to_qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = 2
        return self.proj(y) * h


class Model(nn.Module):
    """It in a residual stream."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.fc = attention(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(x + self.attn(self.norm(x)))


@pytest.mark.parametrize("attention", [Named, Unpacked, TwoNames])
def test_heads_and_the_stream_go(attention: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check(partial(Model, attention), x, ("embed", "attn.to_qkv"), tmp_path)


def test_a_name_that_is_set_twice_stays_one() -> None:
    for attention, names in ((Named, {"heads"}), (SetAnew, {"heads", "h"})):
        code = (own_width.with_own_width(attention) or attention).forward.__code__
        assert names <= {*code.co_names, *code.co_varnames}
    x = torch.randn(4, 6, 5)
    model = Model(SetAnew)
    assert set(trace(model, x[:1]).skipped) >= {"attn.to_qkv", "embed"}
