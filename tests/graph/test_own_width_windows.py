"""Attention whose code takes the width of what it reads for that of its heads, and lays rows out in windows: numbers
that divide rows, not channels, say nothing of heads."""

from pathlib import Path

import pytest
import torch
from test_own_width import HEADS, WIDTH
from test_own_width import Model as OfTokens
from thinned import thinned
from torch import Tensor, nn
from whole_way import check

SIDE, ROWS = 2, 4


class Windows(nn.Module):
    """As Twins' LocallyGroupedAttn: everything in one method, with the windows' side in the views before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.ws = HEADS, SIDE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        H, W = size
        x = x.view(B, H, W, C)
        right, below = (self.ws - W % self.ws) % self.ws, (self.ws - H % self.ws) % self.ws
        x = nn.functional.pad(x, (0, 0, 0, right, 0, below))
        _, Hp, Wp, _ = x.shape
        h, w = Hp // self.ws, Wp // self.ws
        x = x.reshape(B, h, self.ws, w, self.ws, C).transpose(2, 3)
        qkv = self.qkv(x).reshape(B, h * w, self.ws * self.ws, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        x = (q @ k.mT / 2).softmax(-1) @ v
        x = x.transpose(2, 3).reshape(B, h, w, self.ws, self.ws, C)
        x = x.transpose(2, 3).reshape(B, h * self.ws, w * self.ws, C)[:, :H, :W].contiguous()
        return self.proj(x.reshape(B, N, C))


class Nested(Windows):
    """The same, of rows, with the view that makes windows in the statement of the heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        number = N // self.ws
        q, k, v = self.qkv(x.reshape(B * number, self.ws, C)).reshape(
            B * number, self.ws, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, number, self.ws, C).reshape(B, N, C))


class Unnamed(Windows):
    """Heads that are called as nothing else is."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.num_heads
        del self.num_heads

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        number = N // self.ws
        x = x.reshape(B, number, self.ws, C)
        q, k, v = self.qkv(x).reshape(B, number, self.ws, 3, self.parts, C // self.parts).permute(3, 0, 1, 4, 2, 5)
        x = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(x.transpose(2, 3).reshape(B, N, C))


class After(Windows):
    """The windows become rows when the heads have been read, and are as wide as what was read."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        x = x.reshape(B * (N // self.ws), self.ws, C)
        q, k, v = self.qkv(x).reshape(len(x), self.ws, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT / 2).softmax(-1) @ v
        x = self.proj(x.transpose(1, 2).reshape(-1, self.ws, C))
        return x.reshape(B, N, C)


class Model(OfTokens):
    """The same, of tokens in rows of windows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x), (ROWS, x.shape[1] // ROWS))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


@pytest.mark.parametrize(("attention", "columns"), thinned([Windows, Nested, Unnamed, After], [4, 5]))
def test_heads_and_the_stream_go_beside_windows(attention: type[nn.Module], columns: int, tmp_path: Path) -> None:
    """Each without the other: everything from data to a file, by brute force."""
    x = torch.randn(2, ROWS * columns, 5, generator=torch.Generator().manual_seed(1)).double()
    small = check(lambda: Model(attention), x, ["embed", "attn.qkv", "mlp.0"], tmp_path).model
    assert small.attn.ws == SIDE
    heads = small.attn.parts if attention is Unnamed else small.attn.num_heads
    assert heads < HEADS
    assert small.attn.proj.in_features == 4 * heads != small.embed.out_features
