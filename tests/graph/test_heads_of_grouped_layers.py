"""Heads that grouped convolutions make, or read: as many of each group go, since a convolution's groups are as wide."""

from pathlib import Path

import pytest
from attention_layouts import EMBED, HEADS, WIDTH, tokens
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check, noisy

from fastscore.graph.tracing import trace

GROUPS = HEADS // 2


class Squeezed(nn.Module):
    """As SqueezeBert's: channels before tokens, and queries, keys and values of groups of channels."""

    heads, makes, reads = HEADS, GROUPS, 1

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inner = self.heads, self.heads * WIDTH
        self.ask, self.key, self.val = (nn.Conv1d(EMBED, self.inner, 1, groups=self.makes) for _ in range(3))
        self.mix = nn.Conv1d(self.inner, EMBED, 1, groups=self.reads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x.mT).view(len(x), self.count, WIDTH, -1) for layer in (self.ask, self.key, self.val))
        y = v @ (k.mT @ q / 2).softmax(-2)
        return self.mix(y.view(len(x), self.inner, -1)).mT


class Gathered(Squeezed):
    """Whose output is of groups, too, alone."""

    makes, reads = 1, GROUPS


class OfEach(Squeezed):
    """A group makes each head, and would have nothing to make without it."""

    makes = HEADS


class OfTwo(Squeezed):
    """Which keeps its number of groups, too."""

    heads, makes = 2 * HEADS, HEADS

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.makes


@pytest.mark.parametrize("attention", [Squeezed, Gathered])
def test_as_many_heads_of_each_group_go(attention: type[Squeezed], tmp_path: Path) -> None:
    small = check(lambda: Network(attention), tokens(), ["embed", "attn.ask", "mlp.0"], tmp_path).model
    assert small.attn.count == HEADS // 2
    assert (small.attn.ask.groups, small.attn.mix.groups) == (attention.makes, attention.reads)
    graph = trace(noisy(lambda: Network(attention)), tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert group.unit.tolist() == [0, 0, 1, 1] * GROUPS


def test_heads_are_more_than_the_groups_that_make_them() -> None:
    graph = trace(noisy(lambda: Network(OfTwo)), tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert group.unit.tolist() == [0, 0, 1, 1] * HEADS


def test_heads_that_are_groups_stay() -> None:
    graph = trace(noisy(lambda: Network(OfEach)), tokens())
    assert {group.name for group in graph.groups} == {"embed", "mlp.0"}
    assert graph.skipped["attn.ask"].startswith("OfEach does not run with fewer heads")
