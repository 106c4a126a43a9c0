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


class Remembering(Named):
    """A name for what the module held before the call: a method holds something else then."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 1.0

    def remembered(self, y: Tensor) -> Tensor:
        self.last = 2 * self.last
        return y

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, last = self.heads, self.last
        q, k, v = self.to_qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        y = self.remembered((q @ k.mT / 2).softmax(-1) @ v)
        return self.proj((y * last).transpose(1, 2).reshape(b, n, c))


class Counting(Named):
    """A name for what a property counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @property
    def turn(self) -> int:
        self.calls += 1
        return self.calls

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, turn = self.heads, self.turn
        q, k, v = self.to_qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT / turn).softmax(-1) @ v / turn
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


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


@pytest.mark.parametrize("attention", [Named, Unpacked, TwoNames, Remembering, Counting])
def test_the_code_with_its_own_width_computes_the_same(attention: type[nn.Module]) -> None:
    changed = own_width.with_own_width(attention)
    assert changed is not None
    model, other = attention(), attention()
    other.load_state_dict(model.state_dict())
    other.__class__ = changed
    x = torch.randn(4, 6, WIDTH)
    for _ in range(3):
        torch.testing.assert_close(other(x), model(x))


def test_a_name_that_is_set_twice_is_no_count_of_heads() -> None:
    assert own_width.with_own_width(SetAnew) is None
    assert set(trace(Model(SetAnew), torch.randn(1, 6, 5)).skipped) >= {"attn.to_qkv", "embed"}
