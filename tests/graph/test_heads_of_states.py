"""Heads that write to states, and go with all that is theirs."""

from pathlib import Path

import pytest
import torch
from attention_layouts import EMBED, HEADS, INNER, join, split, tokens
from own_attentions import Network
from state_attentions import Delta, DeltaApart, Dual, DualAfter, DualInGroups, Gated
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.heads import head_numbers
from fastscore.graph.tracing import trace


@pytest.mark.parametrize("attention", [Delta, DeltaApart])
def test_heads_of_a_delta_rule_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """With two numbers at once that its code cuts at, and two more, and filters of a layer that is not called."""
    check(lambda: Network(attention), tokens(), ["embed", "attn.into", "mlp.0"], tmp_path)


@pytest.mark.parametrize("attention", [Dual, DualAfter, DualInGroups])
def test_heads_go_that_a_norm_with_a_gate_counts_together(attention: type[nn.Module], tmp_path: Path) -> None:
    small = check(lambda: Network(attention), tokens(), ["embed", "attn.into", "mlp.0"], tmp_path).model
    assert type(small.attn.norm) is Gated
    assert len(small.attn.norm.weight) == INNER // 2


def test_heads_of_one_group_go_together() -> None:
    graph = trace(noisy(lambda: Network(DualInGroups)), tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert group.unit.tolist() == [c * 2 // INNER for c in range(INNER)]


def test_two_heads_of_values_go_with_one_of_keys() -> None:
    graph = trace(noisy(lambda: Network(Delta)), tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert group.unit.tolist() == [c // (INNER // (HEADS // 2)) for c in range(INNER)]
    assert {(member.attribute, len(member.index)) for member in group.role("width")} == {
        ("of_keys", HEADS // 2), ("of_values", HEADS), ("keys", 6), ("values", INNER)}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(EMBED, INNER) for _ in range(3))
        self.o_proj = nn.Linear(INNER, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(layer(x), self.num_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(join((q @ k.mT).softmax(-1) @ v))


class Stays(Network):
    """Whose stream stays, with what the attention makes: code takes it together with a parameter in another shape."""

    def __init__(self) -> None:
        super().__init__(Named)
        self.table = nn.Parameter(torch.randn(2, EMBED // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table.view(EMBED)
        x = x + self.attn(self.norm1(x))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def test_heads_that_names_show_are_found_once() -> None:
    graph = trace(noisy(Stays), tokens())
    assert "takes its channels together with its table" in graph.skipped["attn.o_proj"]
    assert [group.name for group in graph.groups] == ["attn.q_proj", "mlp.0"]


class Numbers(nn.Module):
    """Twelve of them, each 4."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefghijkl":
            setattr(self, name, 4)


def test_numbers_are_found_by_how_far_code_comes_without_them() -> None:
    """Four of twelve: first two at once, of which one shows nothing by itself, and then one after the other."""
    tried = []

    def fails(group: ChannelGroup) -> str | None:
        gone = {member.attribute for member in group.role("width")}
        tried.append(gone)
        for steps, wanted in enumerate(("dk", "f", "l"), 3):
            if not gone.issuperset(wanted):
                return head_numbers.Stopped(f"without {gone & set(wanted) - {'k'}}", steps)
        return "it makes something else" if gone & {"a", "e"} else None

    channels = torch.arange(4)
    group = ChannelGroup("", 4, channels, (Member("", "heads", channels, channels),))
    found = head_numbers.with_numbers(Numbers(), group, fails)
    assert isinstance(found, ChannelGroup)
    assert {member.attribute for member in found.role("width")} == {*"dkfl"}
    assert len(tried) < 60


def test_a_search_for_numbers_ends() -> None:
    tried = []

    def fails(group: ChannelGroup) -> str | None:
        tried.append(group)
        return head_numbers.Stopped(f"for {len(tried)} reasons", 1)

    channels = torch.arange(4)
    group = ChannelGroup("", 4, channels, (Member("", "heads", channels, channels),))
    assert head_numbers.with_numbers(Numbers(), group, fails) == "for 1 reasons"
    assert len(tried) < 70
