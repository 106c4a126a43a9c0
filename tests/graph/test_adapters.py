"""Adapters of low rank beside layers, as PEFT lays them, go with what they add to; their ranks are channels."""

from pathlib import Path

import torch
import whole_way
from torch import Tensor, nn

import fastscore

DIM, HEADS, WIDTH, RANK = 8, 4, 3, 4


class Adapted(nn.Module):
    """A layer, and two of low rank beside it, with the names that PEFT gives them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


class Attention(nn.Module):
    """Of which some layers are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH
        self.q_proj, self.v_proj = (Adapted(nn.Linear(DIM, HEADS * WIDTH)) for _ in range(2))
        self.k_proj, self.o_proj = nn.Linear(DIM, HEADS * WIDTH), Adapted(nn.Linear(HEADS * WIDTH, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A residual stream around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(4, DIM), Attention(), nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x)).mean(1)


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).double()


def test_whole_way(tmp_path: Path) -> None:
    ranks = [f"attn.{name}_proj.lora_A.default" for name in "qvo"]
    attention = whole_way.check(Model, X, ["embed", "attn.q_proj", *ranks], tmp_path).model.attn
    assert attention.q_proj.lora_B["default"].weight.shape == (HEADS * WIDTH // 2, RANK // 2)
    assert attention.o_proj.lora_A["default"].weight.shape == (RANK // 2, HEADS * WIDTH // 2)


def test_an_adapter_takes_in_no_mean() -> None:
    """PEFT merges the product of its two layers alone: a bias would be lost."""
    model = whole_way.noisy(Model)
    scores = fastscore.score(model, [X], progress=False)
    small = fastscore.prune(model, scores, X, channels=0.6, scope="layer").model
    assert all(layer.bias is None for name, layer in small.named_modules() if name.endswith("default"))
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, X, scope="layer"):
        torch.testing.assert_close(small(X), model(X))
