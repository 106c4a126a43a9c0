"""Heads whose number stands in a table of sizes that a module keeps: a dict, or pairs of a name and a number."""

import copy
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_layouts import EMBED, HEADS, INNER, tokens
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace


class Table(nn.Module):
    """A layer that splits channels as a table says."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.sizes["h"], -1).transpose(1, 2)


class Pairs(Table):
    """That keeps pairs."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.pairs = tuple(sizes.items())

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], dict(self.pairs)["h"], -1).transpose(1, 2)


class Derived(Table):
    """That makes what it runs with of the table, and of nothing else when it is copied, as einops's layers do."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self._made = tuple(self.sizes.items())

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["sizes"])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], dict(self._made)["h"], -1).transpose(1, 2)


def einops() -> nn.Module:
    pytest.importorskip("einops")
    made: nn.Module = importlib.import_module("einops.layers.torch").Rearrange("b n (h d) -> b h n d", h=HEADS)
    return made


LAYERS = {"dict": partial(Table, h=HEADS), "pairs": partial(Pairs, h=HEADS), "of two": partial(Table, h=HEADS, d=2),
          "of more": partial(Table, h=HEADS, rate=0.5, name="heads"), "derived": partial(Derived, h=HEADS),
          "einops": einops}


class Attention(nn.Module):
    """Each of whose projections stands beside a layer of its own, or beside one that all share."""

    def __init__(self, layer: Any, shared: bool) -> None:
        super().__init__()
        splits = [layer()] * 3 if shared else [layer() for _ in range(3)]
        self.to_q, self.to_k, self.to_v = (nn.Sequential(nn.Linear(EMBED, INNER), split) for split in splits)
        self.last = nn.Linear(INNER, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.last(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_heads_go_with_their_number_in_a_table(layer: str, shared: bool, tmp_path: Path) -> None:
    small = check(lambda: Network(lambda: Attention(LAYERS[layer], shared)), tokens(),
                  ["embed", "attn.to_q.0", "mlp.0"], tmp_path).model
    copied = copy.deepcopy(small).train()
    torch.testing.assert_close(copied(tokens()), small(tokens()))


def test_a_model_keeps_its_table() -> None:
    model = noisy(lambda: Network(lambda: Attention(LAYERS["derived"], shared=False)))
    trace(model, tokens())
    assert model.attn.to_q[1].sizes == {"h": HEADS}
    assert model.attn.to_q[1]._made == (("h", HEADS),)


class BySubscript(Table):
    """That does something else with many heads, of many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh() if x.shape[1] > 99 and self.sizes["h"] > 2 else x)


class ByGet(Table):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh() if x.shape[1] > 99 and self.sizes.get("h", 1) > 2 else x)


class ByValues(Table):
    def forward(self, x: Tensor) -> Tensor:
        for number in self.sizes.values():
            x = x.tanh() if x.shape[1] > 99 and number > 2 else x
        return super().forward(x)


class ByAnother(Table):
    """By a number of the table that counts something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh() if x.shape[1] > 99 and self.sizes["other"] > 2 else x)


@pytest.mark.parametrize("layer", [BySubscript, ByGet, ByValues, ByAnother])
def test_heads_stay_by_whose_number_code_decides(layer: type[Table]) -> None:
    attention = partial(Attention, partial(layer, h=HEADS, other=HEADS), shared=False)
    graph = trace(noisy(lambda: Network(attention)), tokens())
    goes = "attn.to_q.0" in {group.name for group in graph.groups}
    assert goes is (layer is ByAnother)
    assert goes or "more than a size" in graph.skipped["attn.to_q.0"]
