"""Attention of images by convolutions, whose code takes how many channels it reads for those of its heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.cutting import surgery
from fastscore.graph.tracing import trace

WIDTH, HEADS = 12, 3


class Pixels(nn.Module):
    """Queries, keys and values of a convolution each; all pixels ask all."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.ask, self.key, self.val, self.mix = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = (layer(x).view(B, self.heads, C // self.heads, H * W) for layer in (self.ask, self.key, self.val))
        weights = (q.mT @ k / (C // self.heads) ** 0.5).softmax(-1)
        return self.mix((v @ weights.mT).reshape(B, C, H, W))


class Together(nn.Module):
    """All three of one layer, taken apart along the channels; heads lie beside samples."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.size()
        q, k, v = (y.reshape(b * self.num_heads, c // self.num_heads, -1) for y in self.qkv(x).chunk(3, 1))
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return self.proj(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, *size))


class Across(Together):
    """Channels ask channels, by cosines and a temperature for each head (Restormer), and the width is asked for where
    it is needed; the convolution behind the three is of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.dw = nn.Parameter(torch.ones(HEADS, 1, 1)), nn.Conv2d(
            3 * WIDTH, 3 * WIDTH, 3, 1, 1, groups=3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        of_heads = (x.shape[0], 3, self.num_heads, x.shape[1] // self.num_heads, -1)
        q, k, v = self.dw(self.qkv(x)).reshape(of_heads).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.mT * self.temperature).softmax(-1) @ v
        return self.proj(y.reshape(x.shape[0], x.shape[1], *x.shape[2:]))


class Sequences(nn.Module):
    """Of sequences whose channels come first, with PyTorch's own attention and scale."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.q, self.k, self.v, self.out = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, T = x.shape
        q, k, v = (y.view(B, self.n_head, C // self.n_head, T).mT for y in (self.q(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v).mT.reshape(B, C, T))


class Tokens(nn.Module):
    """Of tokens, which lie before channels, by convolutions: what is second in their shape is no width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = HEADS, WIDTH // HEADS
        self.q, self.k, self.v, self.out = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        return self.attend(x).mT

    def attend(self, x: Tensor) -> Tensor:
        B, N, _C = x.shape
        q, k, v = (layer(x.mT).view(B, self.heads, self.head_dim, N) for layer in (self.q, self.k, self.v))
        y = v @ (q.mT @ k).softmax(-1).mT
        return self.out(y.reshape(B, -1, N)).mT


class Network(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        conv: Any = nn.Conv1d if attention in (Sequences, Tokens) else nn.Conv2d
        self.embed, self.attn = conv(3, WIDTH, 1), attention()
        self.wide, self.narrow = conv(WIDTH, 16, 1), conv(16, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(x)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.head(x.flatten(2).mean(2))


def _x(attention: Callable[[], nn.Module]) -> Tensor:
    size = (6,) if attention in (Sequences, Tokens) else (4, 3)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("attention", [Pixels, Together, Across, Sequences, Tokens])
def test_heads_and_streams_go(attention: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Everything from data to a file, by brute force."""
    first = {Pixels: "ask", Sequences: "q", Tokens: "q"}.get(attention, "qkv")
    check(lambda: Network(attention), _x(attention), ["embed", f"attn.{first}", "wide"], tmp_path)


@pytest.mark.parametrize("attention", [Pixels, Together, Across, Sequences])
def test_a_stream_goes_alone(attention: Callable[[], nn.Module]) -> None:
    """As many heads as ever, of their width, of fewer channels; and then heads of these."""
    model, x = noisy(lambda: Network(attention)), _x(attention)
    gone = {"embed": torch.arange(0, WIDTH, 2)}
    small = surgery.smaller_copy(model, lambda copy: surgery.remove_channels(copy, trace(model, x).groups, gone))
    masked = noisy(lambda: Network(attention))
    masked.load_state_dict(model.state_dict())
    last = {Pixels: "mix", Sequences: "out"}.get(attention, "proj")
    for layer in (masked.embed, masked.narrow, masked.attn.get_submodule(last)):
        layer.weight.data[gone["embed"]], layer.bias.data[gone["embed"]] = 0, 0
    torch.testing.assert_close(small(x), masked(x))
    (heads,) = (group for group in trace(small, x).groups if any(group.role("heads")))
    assert heads.unit.tolist() == [c // (WIDTH // HEADS) for c in range(WIDTH)]
    smaller = surgery.smaller_copy(small, lambda copy: surgery.remove_channels(
        copy, trace(small, x).groups, {heads.name: heads.first_step()}))
    assert smaller(x).isfinite().all()
