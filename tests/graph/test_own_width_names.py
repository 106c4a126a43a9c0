"""Attention whose code takes the width of what it reads for that of its heads, and counts heads by other names."""

from pathlib import Path

import pytest
import torch
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
