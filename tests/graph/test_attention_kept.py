"""Heads that cannot go, and what only looks like heads: kept, with the reason."""

import re
from collections.abc import Callable

import pytest
import torch
from attentions import EMBEDDING, HEADS, TOKENS, WIDTH, Apart, Fused, Multihead, attend, inputs, network, qkv_blocks
from computed_elsewhere import computed_elsewhere
from oracles import untouched
from torch import Tensor, nn

from fastscore.graph.tracing import trace


class ValuesElsewhere(Apart):
    """Whose values are read past the attention too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.v_proj(x).mean(2, keepdim=True)


class Mixing(Apart):
    """Whose heads read each other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k + k.mean(1, keepdim=True), v))


class FixedWidth(Fused):
    """Whose code writes the width down."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layout(self.qkv(x))
        return self.proj(attend(q, k, v).reshape(len(x), TOKENS, HEADS * WIDTH))


class NotCalled(Apart):
    """Whose output projection is no layer that runs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return attend(q, k, v) @ self.o_proj.weight.t()


def _parametrized() -> nn.Module:
    attention = Apart()
    computed_elsewhere(attention.k_proj)
    return attention


def _sharing() -> nn.Module:
    attention = Apart()
    attention.k_proj.weight = attention.v_proj.weight
    return attention


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "heads that read each other": (Mixing, "computes something else"),
    "a width in the code": (lambda: FixedWidth(qkv_blocks), "does not run with fewer heads"),
    "one head": (lambda: Multihead(heads=1), "one head"),
    "computed weights": (_parametrized, "parametrization"),
    "shared weights": (_sharing, "shares its weight"),
    "an output that is not called": (NotCalled, "does not call"),
    "values read elsewhere": (ValuesElsewhere, "something else|cannot follow"),
}


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_heads_that_cannot_go_are_left_alone_with_a_reason(name: str) -> None:
    build, reason = LEFT_ALONE[name]
    model = network(build)
    with untouched(model):
        graph = trace(model, inputs())
    assert not graph.without(model, EMBEDDING).groups
    assert any(re.search(reason, why) for layer, why in graph.skipped.items() if layer.startswith("attention")), \
        dict(graph.skipped)


class HandedOn(nn.Module):
    """Two attentions, of which the second takes its bias for each head from the first; then one that takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (Apart() for _ in range(3))
        self.one.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_ones(self.one.num_heads, 1, TOKENS) * torch.arange(TOKENS)
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.two.q_proj, self.two.k_proj, self.two.v_proj))
        return self.three(self.one(x) + self.two.o_proj(attend(q, k, v, bias)))


def test_heads_that_others_count_on_are_left_alone() -> None:
    graph = trace(network(HandedOn), inputs())
    assert [group.name for group in graph.groups if "q_proj" in group.name] == ["attention.two.q_proj",
                                                                                  "attention.three.q_proj"]
    assert "the model does not run with fewer heads there" in graph.skipped["attention.one.q_proj"]
