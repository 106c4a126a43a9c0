"""Heads of which layers read something before the attention: these lose inputs with them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_layouts import EMBED, HEADS, INNER, WIDTH, tokens
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace


class Masked(nn.Module):
    """As Doge's: a layer makes, of the values of all heads, what each head adds to its scores."""

    shared = 2  # heads of keys and values

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(EMBED, INNER), nn.Linear(INNER, EMBED)
        self.k_proj, self.v_proj = (nn.Linear(EMBED, self.shared * WIDTH) for _ in range(2))
        self.steep, self.steps = nn.Parameter(torch.rand(self.shared)), nn.Linear(self.shared * WIDTH, self.shared)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        mask = (F.softplus(self.steps(self.laid_out(v))) * self.steep).mT[:, :, None]
        k, v, mask = (y.repeat_interleave(HEADS // self.shared, 1) for y in (k, v, mask))
        return self.o_proj(((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def laid_out(self, v: Tensor) -> Tensor:
        return v.transpose(1, 2).flatten(2)


class Apart(Masked):
    """Whose heads have keys and values of their own."""

    shared = HEADS


class Across(Masked):
    """Whose layer reads one number of each head after another."""

    def laid_out(self, v: Tensor) -> Tensor:
        return v.permute(0, 2, 3, 1).flatten(2)


class LowRank(Masked):
    """Whose queries and values come through fewer channels, which are no heads'."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Sequential(nn.Linear(EMBED, HEADS), nn.Linear(HEADS, INNER))
        self.v_proj = nn.Sequential(nn.Linear(EMBED, HEADS), nn.Linear(HEADS, self.shared * WIDTH))


class Added(Masked):
    """Whose layer reads sums of what two heads have: it stays as wide, and so do they."""

    def laid_out(self, v: Tensor) -> Tensor:
        return (v + v.flip(1)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attention", [Masked, Apart, Across, LowRank])
def test_heads_go(attention: type[Masked], tmp_path: Path) -> None:
    low = attention is LowRank
    ranks = ["attn.q_proj.0", "attn.v_proj.0"] if low else []
    small = check(lambda: Network(attention), tokens(), ["embed", f"attn.q_proj{'.1' if low else ''}", "mlp.0", *ranks],
                  tmp_path).model
    assert small.attn.steps.weight.shape == (attention.shared // 2, attention.shared // 2 * WIDTH)
    assert small.attn.steep.shape == (attention.shared // 2,)


def test_heads_whose_sums_a_layer_reads_stay() -> None:
    graph = trace(noisy(lambda: Network(Added)), tokens())
    assert {group.name for group in graph.groups} == {"embed", "mlp.0"}
    assert "does not run with fewer heads" in graph.skipped["attn.q_proj"]
