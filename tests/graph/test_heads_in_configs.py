"""Heads of attentions that read how many they have of a config that others share."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_layouts import EMBED, HEADS, INNER, TOKENS, WIDTH, join
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check

SHARED = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=HEADS, width=WIDTH)


class OfKeys(nn.Module):
    """That reads the number of heads of keys alone, for queries, too, as Moonshine does."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SHARED
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(EMBED, INNER) for _ in range(3))
        self.o_proj = nn.Linear(INNER, EMBED)

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.config.num_key_value_heads, self.config.width).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(join(self.between(q, k, v)))


class Biased(OfKeys):
    """With biases of queries that are called as nn.MultiheadAttention's of values, in other shapes, as Parakeet's."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_k, self.bias_v = (nn.Parameter(torch.randn(HEADS, WIDTH)) for _ in range(2))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        away = (q + self.bias_v.view(self.config.num_attention_heads, 1, -1)) @ k.mT.flip(-1)
        weights = (q + self.bias_k[:, None]) @ k.mT + away
        return (weights * self.temperature).softmax(-1) @ v


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.weight = HEADS, nn.Parameter(torch.rand(INNER) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_heads:
            raise ValueError("another number of heads")
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight.view(self.num_heads, 1, -1)


class InChild(OfKeys):
    """Which a child counts, too, as xLSTM's norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.head_norm = _Norm()

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.head_norm(super().between(q, k, v))


@pytest.mark.parametrize("attention", [OfKeys, Biased, InChild])
def test_heads_go_that_a_shared_config_counts(attention: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(3, TOKENS, 3, generator=torch.Generator().manual_seed(1)).double()
    small = check(lambda: Network(attention), x, ["embed", "attn.q_proj", "mlp.0"], tmp_path).model
    assert small.attn.config.num_key_value_heads == HEADS // 2
    assert SHARED.num_key_value_heads == HEADS
