"""Verification: what a group claims shows where it says, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.trials import verification
from fastscore.graph.trials.recording import Recording
from fastscore.modules.evaluation_copy import evaluation_copy


class Between(nn.Module):
    """Two convolutions, a third beside them, and something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.read, self.other, self.between = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), \
            between

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4, H, W]."""
        x = self.make(x)
        return self.read(self.between(x)) + self.other(x)


def _group(readers: tuple[str, ...], order: Tensor | None = None, channels: Tensor | None = None) -> ChannelGroup:
    every = torch.arange(6)
    index = every if order is None else order
    channel = every if channels is None else channels
    members = [Member("make", "producer", every, every)]
    return ChannelGroup("make", 6, every, (*members, *(Member(reader, "consumer", index, channel)
                                                       for reader in readers)))


def _leaks(between: Callable[[Tensor], Tensor], group: ChannelGroup) -> dict[str, str]:
    torch.manual_seed(0)
    model = evaluation_copy(Between(between).double()).requires_grad_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    recording = Recording(model, lambda model: model(x).flatten())
    with recording.record():
        model(x)
    assert recording.layers_that_ran == {"make", "read", "other"}
    assert list(recording.first_layers) == ["make"]
    assert not any("forward" in vars(module) for module in model.modules())
    return verification.leaks(recording, [group])


@pytest.mark.parametrize("between", [F.relu, lambda x: x * 2 + 1, lambda x: x.sigmoid() * x,
                                     nn.GroupNorm(2, 6).double()],
                         ids=["relu", "affine", "silu", "GroupNorm"])
def test_a_group_that_claims_all_its_readers_does_not_leak(between: Callable[[Tensor], Tensor]) -> None:
    """Through elementwise operations, and a GroupNorm, whose statistics are of all channels."""
    assert _leaks(between, _group(("read", "other"))) == {}


@pytest.mark.parametrize("between", [lambda x: x + x.mean(1, keepdim=True), lambda x: x.flip(1), lambda x: x.softmax(1),
                                     lambda x: x.cumsum(1), lambda x: x.roll(1, 1)],
                         ids=["mean", "flip", "softmax", "cumsum", "roll"])
def test_channels_that_are_mixed_or_moved_leak(between: Callable[[Tensor], Tensor]) -> None:
    """Named is the layer where they show."""
    assert _leaks(between, _group(("read", "other"))) == {"make": "read"}


def test_a_reader_that_is_not_claimed_is_found() -> None:
    """And so is one position that is not."""
    assert _leaks(F.relu, _group(("read",))) == {"make": "other"}
    assert _leaks(F.relu, _group(("read", "other"), torch.arange(5), torch.arange(5))) == {"make": "read"}


def test_a_permutation_that_is_claimed_is_right() -> None:
    """Positions count, not their number."""
    order = torch.tensor([3, 1, 4, 0, 5, 2])
    between = lambda x: x[:, order]  # noqa: E731
    moved = order.argsort()  # channel c is at moved[c]
    every = torch.arange(6)
    group = ChannelGroup("make", 6, every, (Member("make", "producer", every, every),
                                            Member("read", "consumer", moved, every),
                                            Member("other", "consumer", every, every)))
    assert _leaks(between, group) == {}
    assert _leaks(between, _group(("read", "other"))) == {"make": "read"}


def test_the_output_is_a_place_too() -> None:
    """Channels that reach it past every layer."""
    class ToOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.make(x)
            return self.read(y) + y

    model = evaluation_copy(ToOutput())
    recording = Recording(model, lambda model: model(torch.ones(2, 3)).flatten())
    with recording.record():
        model(torch.ones(2, 3))
    assert verification.leaks(recording, [_group(("read",))]) == {"make": "the output"}
