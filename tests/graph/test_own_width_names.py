"""Attention whose code takes the width of what it reads for that of its heads, and has other names for the number of
heads, or for the projection that reads them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_own_width import HEADS, WIDTH, Model
from torch import Tensor, nn
from whole_way import check


class Checked(nn.Module):
    """As ProphetNet's: the width of what it reads has a name, and every shape is compared with what it should be."""

    count = "num_attn_heads"

    def __init__(self) -> None:
        super().__init__()
        setattr(self, self.count, HEADS)
        self.head_dim = WIDTH // HEADS
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, hidden_size = x.size()
        assert list(x.size()) == [batch_size, length, hidden_size]
        q, k, v = (layer(x).view(batch_size, -1, self.num_attn_heads, self.head_dim).transpose(1, 2)
                   for layer in (self.query_proj, self.key_proj, self.value_proj))
        weights = torch.einsum("bsij,bsjk->bsik", q / self.head_dim ** 0.5, k.mT).softmax(-1)
        y = torch.einsum("bsij,bsjk->bsik", weights, v)
        if y.size() != (expected := (batch_size, self.num_attn_heads, length, self.head_dim)):
            raise ValueError(f"{y.size()} should be {expected}")
        return self.out_proj(y.transpose(1, 2).reshape(batch_size, length, hidden_size))


class Short(Checked):
    """As PyTorch's own layers of transformers call their number of heads."""

    count = "nhead"

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, hidden_size = x.size()
        q, k, v = (layer(x).view(batch_size, -1, self.nhead, self.head_dim).transpose(1, 2)
                   for layer in (self.query_proj, self.key_proj, self.value_proj))
        y = (q @ k.mT / self.head_dim ** 0.5).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).reshape(batch_size, length, hidden_size))


@pytest.mark.parametrize("attention", [Checked, Short])
def test_heads_and_the_stream_go(attention: type[Checked], tmp_path: Path) -> None:
    small = check(lambda: Model(attention), torch.randn(2, 6, 5).double(), ["embed", "attn.query_proj", "mlp.0"],
                  tmp_path).model
    assert getattr(small.attn, attention.count) < HEADS
    assert small.attn.out_proj.in_features == 4 * getattr(small.attn, attention.count) != small.embed.out_features


class Retention(nn.Module):
    """As RetNet's: a layer called `o` reads what is multiplied by a gate, which another makes in the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(HEADS, WIDTH)
        self.register_buffer("gamma", 1 - 2.0 ** (-2 - torch.arange(HEADS)))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        far = torch.arange(T)[:, None] - torch.arange(T)
        y = (q @ k.mT * self.gamma[:, None, None] ** far.clamp(min=0) * (far >= 0)) @ v
        y = self.norm(y.transpose(1, 2).reshape(B * T, C)).view(B, T, C)
        return self.o(F.silu(self.g(x)) * y)


class InOneLine(Retention):
    """One that hands the product to the layer that reads it at once."""

    def __init__(self) -> None:
        super().__init__()
        del self.g, self.norm, self.gamma

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("attention", [Retention, InOneLine])
def test_the_layer_that_reads_heads_is_known_by_its_place(attention: type[Retention], tmp_path: Path) -> None:
    small = check(lambda: Model(attention), torch.randn(2, 6, 5).double(), ["embed", "attn.q", "mlp.0"], tmp_path).model
    assert small.attn.heads < HEADS
    assert small.attn.o.in_features == 4 * small.attn.heads != small.embed.out_features
