"""Heads of attentions that nobody has named: found by what their code does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_layouts import HEADS, Apart, Filled, OneProjection, Rotary, Thin, Woven, tokens
from own_attentions import (
    KINDS,
    Across,
    Convolved,
    HeadGate,
    Memory,
    NetBias,
    Network,
    Normed,
    Retention,
    RowBias,
    SharedSinks,
    Sinks,
    Slopes,
    TableBias,
    Talking,
    TalkingOnce,
)
from thinned import thinned
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


@pytest.mark.parametrize("attention", [OneProjection, Rotary, Sinks, HeadGate, Slopes, Retention, Normed, Memory,
                                       Across, TableBias, RowBias, NetBias, Talking, TalkingOnce, Woven, Thin,
                                       Convolved])
def test_heads_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """Everything from data to a file, by brute force."""
    others = {Memory: ["attn.context"], Talking: ["attn.before"]}.get(attention, [])
    check(lambda: Network(attention), tokens(), ["embed", f"attn.{KINDS[attention]}", "mlp.0", *others], tmp_path,
          only=attention is not NetBias)  # of which no gradient tells samples apart


@pytest.mark.parametrize("attention", list(KINDS))
def test_a_unit_is_a_head(attention: type[nn.Module]) -> None:
    graph = trace(noisy(lambda: Network(attention)), tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    units = HEADS // 2 if attention in (Rotary, SharedSinks) else HEADS
    assert group.unit.tolist() == [c % HEADS if attention in (Across, Woven) else c * units // group.channels
                                   for c in range(group.channels)]
    assert len(next(group.role("heads")).index) == HEADS


def test_what_a_head_has_beside_its_rows_goes_with_it() -> None:
    model, x = noisy(lambda: Network(Retention)), tokens()
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", ignore=["embed", "mlp.0"])
    kept = torch.arange(HEADS)[~torch.isin(torch.arange(HEADS), result.removed["attn.ask"] // 2)]
    assert torch.equal(result.model.attn.decay, model.attn.decay[kept])
    assert result.model.attn.h == result.model.attn.norm.num_groups == len(kept) == HEADS // 2
    assert result.model.attn.norm.num_channels == result.model.attn.gate.out_features == HEADS


class Mixed(HeadGate):
    """Its heads read each other by a matrix that is computed from one that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("nhij,hg->ngij", super().scores(q, k), self.talk.tanh())


class TalkingItself(Mixed):
    """Or by that itself, which goes as a layer would."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("nhij,hg->ngij", HeadGate.scores(self, q, k), self.talk)


def test_heads_that_talk_by_a_parameter(tmp_path: Path) -> None:
    small = check(lambda: Network(TalkingItself), tokens(), ["attn.q_proj"], tmp_path, only=False).model
    assert small.attn.talk.shape == (HEADS // 2, HEADS // 2)


class Fixed(HeadGate):
    """The number of heads stands in its code."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.after(x, self.between(q, k, v)))


@pytest.mark.parametrize(("attention", "reason"), [(Mixed, "its heads read each other"),
                                                   (Fixed, "does not run with fewer")])
def test_heads_that_stay_have_their_reason(attention: type[nn.Module], reason: str) -> None:
    graph = trace(noisy(lambda: Network(attention)), tokens())
    assert {"embed", "mlp.0"} <= {group.name for group in graph.groups}
    assert not any(any(group.role("heads")) for group in graph.groups)
    assert reason in graph.skipped["attn.q_proj"]
    assert {graph.skipped[f"attn.{name}"] for name in ("k_proj", "v_proj", "gate")} == {
        "its channels go with those of attn.q_proj"}


class Alone(nn.Module):
    """A ModuleList of heads, whose values are channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.ModuleList(nn.Linear(12, 2) for _ in range(3)) for _ in range(HEADS))
        self.mix = nn.Linear(2 * HEADS, 12)

    def forward(self, x: Tensor) -> Tensor:
        made = ((layer(x) for layer in head) for head in self.each)
        return self.mix(torch.cat([(q @ k.mT).softmax(-1) @ v for q, k, v in made], -1))


def test_heads_with_layers_of_their_own_are_no_heads() -> None:
    graph = trace(noisy(lambda: Network(Alone)), tokens())
    assert {f"attn.each.{head}.2" for head in range(HEADS)} <= {group.name for group in graph.groups}
    assert not any(any(group.role("heads")) for group in graph.groups)


class Ordered(nn.Module):
    """Whose queries, keys and values lie one after another, or those of each head together."""

    def __init__(self, order: str | tuple[int, int]) -> None:
        super().__init__()
        self.order, self.count, self.width = order, HEADS, 2
        self.into, self.mix = nn.Linear(12, 3 * HEADS * 2), nn.Linear(HEADS * 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (self.count, 3) if self.order in ("by head", (1, 0)) else (3, self.count)
        made = self.into(x).unflatten(-1, (*sizes, self.width)).movedim(sizes.index(3) - 3, 0)
        q, k, v = (y.transpose(1, 2) for y in made)
        return self.mix(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("orders", [("one by one", "by head"), ((0, 1), (1, 0))])
def test_modules_that_a_setting_tells_apart_are_tried_apart(orders: tuple[Any, Any]) -> None:
    graph = trace(noisy(lambda: Network(lambda: nn.Sequential(*map(Ordered, orders)))), tokens())
    heads = {group.name: next(group.role("producer")).channel for group in graph.groups if any(group.role("heads"))}
    assert set(heads) == {"attn.0.into", "attn.1.into"}
    assert not torch.equal(*heads.values())


class Certain(Apart):
    """Whose softmax chooses one token: nothing before it has a gradient that float64 can hold."""

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 1e6).softmax(-1) @ v


class Fused(Apart):
    """The same, in one operation."""

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1e6)


class Rare(Apart):
    """Whose features of queries and keys are mostly zero."""

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.relu(q - 0.5) @ (F.relu(k - 0.5).mT @ v)


@pytest.mark.parametrize(("attention", "samples"), thinned([Certain, Fused, Rare], [1, 3]))
def test_heads_are_found_whatever_has_a_gradient(attention: type[nn.Module], samples: int) -> None:
    graph = trace(noisy(lambda: Network(attention)), tokens()[:samples])
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert {member.layer: len(member.index) for member in group.role("producer")} == dict.fromkeys(
        ("attn.ask", "attn.key", "attn.val"), HEADS * 2)
    assert group.unit.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["inner_dim", "dim"])
def test_a_stream_as_wide_as_its_heads_is_told_from_them(name: str, tmp_path: Path) -> None:
    """Whatever its width is called."""
    class Wide(Filled):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, 12)

        def forward(self, x: Tensor) -> Tensor:
            B, T, _ = x.shape
            q, k, v = (layer(x).view(B, T, self.n_head, -1).transpose(1, 2) for layer in (self.ask, self.key, self.val))
            return self.mix(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)).view(B, T, getattr(self, name))

    result = check(lambda: Network(Wide), tokens(), ["embed", "attn.ask", "mlp.0"], tmp_path)
    assert result.model.attn.n_head == HEADS // 2
    assert getattr(result.model.attn, name) == result.model.embed.out_features < 12
