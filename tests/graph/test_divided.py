"""Layers that make several numbers for each channel, which a view tells apart: adaptive normalisations."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import whole_way
from torch import Tensor, nn

from fastscore.graph.following.index_maps import CHANNEL, divided
from fastscore.graph.tracing import trace

WIDTH, HELD = 6, 8


class Modulated(nn.Module):
    """A stream that is scaled and shifted by what one layer makes of a condition, and by a table, as in PixArt; beside
    it a memory, of whose width the code takes the stream's to be."""

    def __init__(self, last: bool, fixed: bool = False) -> None:
        super().__init__()
        self.last, self.fixed = last, fixed
        self.embed, self.condition, self.memory = nn.Linear(4, WIDTH), nn.Linear(4, 2 * WIDTH), nn.Linear(4, WIDTH)
        self.norm, self.inner, self.table = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(
            torch.randn(2, WIDTH) if last else torch.randn(WIDTH, 2))
        self.read, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        made = self.condition(x.mean(1)).tanh()
        made = made.reshape(len(x), 2, WIDTH if self.fixed else -1) if self.last else made.reshape(len(x), -1, 2)
        parts = (self.table[None] + made).chunk(2, 1 if self.last else 2)
        shift, scale = (part.reshape(len(x), 1, -1) for part in parts)
        y = y + self.inner(self.norm(y) * (1 + scale) + shift)
        memory = self.memory(x).view(len(x), -1, y.shape[-1])
        return self.head(y + self.read(memory).tanh()).mean(1)


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("last", [True, False])
def test_whole_way(last: bool, tmp_path: Path) -> None:
    """Each channel goes with all that is made for it, and with one of the memory."""
    small = whole_way.check(lambda: Modulated(last), X, ["memory"], tmp_path).model
    assert small.condition.weight.shape == (WIDTH, 4)
    assert small.memory.out_features == WIDTH // 2
    (group,) = trace(Modulated(last), X.float()).groups
    (condition,) = (member for member in group.members if member.layer == "condition")
    channel = torch.arange(2 * WIDTH) % WIDTH if last else torch.arange(2 * WIDTH) // 2
    assert torch.equal(condition.channel[condition.index.argsort()], channel)


class Reduced(nn.Module):
    """Attention of one head to fewer tokens, as in PVT: what reduces them is given the width of the stream, and the
    values, which the stream reads, a width of their own that the code holds."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(HELD, HELD), nn.Linear(HELD, HELD)
        self.query, self.key = nn.Linear(HELD, HELD), nn.Linear(HELD, HELD)
        self.reduction, self.norm = nn.Conv1d(HELD, HELD, 2, 2), nn.LayerNorm(HELD)

    def forward(self, y: Tensor) -> Tensor:
        samples, _, width = y.shape
        less = self.reduction(y.transpose(1, 2)).reshape(samples, width, -1).transpose(1, 2)
        less = self.norm(less)
        queries, keys, values = (tensor.view(samples, -1, 1, HELD).transpose(1, 2) for tensor in (
            self.query(y), self.key(less), self.value(less)))
        read = (queries @ keys.transpose(-1, -2)).softmax(-1) @ values
        return y + self.out(read.transpose(1, 2).reshape(samples, -1, HELD))


def test_what_joins_in_vain_is_left_out(tmp_path: Path) -> None:
    """The values are the first that might go with the stream, and cannot."""
    whole_way.check(lambda: nn.Sequential(OrderedDict(embed=nn.Linear(4, HELD), attention=Reduced(),
                                                      head=nn.Linear(HELD, 3))), X[:, :4], ["embed"], tmp_path)


def test_a_width_that_the_code_holds_is_said() -> None:
    reasons = trace(Modulated(True, fixed=True), X.float()).skipped
    assert any("is invalid for input of size" in reason for reason in reasons.values())


@pytest.mark.parametrize(("dim", "before", "at", "after"), [
    (1, (2, 12), 1, (2, 3, 4)), (1, (2, 12), 2, (2, 3, 4)), (1, (2, 12, 5), 2, (2, 3, 4, 5)),
    (2, (2, 5, 12), 3, (10, 2, 2, 3)), (0, (12, 5), 1, (2, 3, 2, 5))])
def test_positions_are_those_of_a_view(dim: int, before: tuple[int, ...], at: int, after: tuple[int, ...]) -> None:
    """Where a number lies along one dimension before, and along another after."""
    shape = [1] * len(before)
    shape[dim] = -1
    numbered = torch.arange(before[dim]).view(shape).expand(before).reshape(after)
    moved = divided(dim, before, at, after)
    assert moved is not None
    for place in range(after[at]):
        there = sorted(numbered.select(at, place).unique().tolist())
        back = moved.inverse(torch.tensor([place << 32 | 7]).numpy())
        assert [int(each) >> 32 for each in back] == there
        for position in there:
            (forth,) = moved.forward(torch.tensor([position << 32 | 7]).numpy())
            assert (int(forth) >> 32, int(forth) & CHANNEL) == (place, 7)


@pytest.mark.parametrize(("dim", "before", "at", "after"), [(1, (2, 12), 0, (2, 3, 4)), (1, (4, 6), 1, (2, 4, 3)),
                                                            (1, (2, 12, 5), 3, (2, 3, 4, 5))])
def test_other_dimensions_hold_none(dim: int, before: tuple[int, ...], at: int, after: tuple[int, ...]) -> None:
    assert divided(dim, before, at, after) is None
