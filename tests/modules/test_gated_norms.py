"""Normalisations that are called with a gate: known by what they compute, and with fewer channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from state_attentions import Gated
from torch import Tensor, nn

from fastscore.modules.norms import gated_norms
from fastscore.modules.norms.channel_norms import gradient_of_statistics, narrow
from fastscore.modules.norms.gated_norms import GatedNorm, gated_norm_of

CHANNELS = 12


class Sigmoid(Gated):
    """Whose gates go through another function."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        made: Tensor = super().forward(x)
        return made * gate.sigmoid()


class Centered(Gated):
    """That takes the mean off, too."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True), gate)


class Mixing(Gated):
    """Whose gates are of all channels."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x, None if gate is None else gate.mean(-1, keepdim=True))


class Written(Gated):
    """Whose eps stands in its code."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        x = x * F.silu(gate)
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * self.weight


def built(cls: type[Gated] = Gated, groups: int = 1, before: bool = True) -> Gated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(CHANNELS, groups, before).double()


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(2, 5, CHANNELS, generator=random, dtype=torch.float64) for _ in range(2))
    return x * 0.02, gate  # where eps counts


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_norm_is_known_by_what_it_computes(groups: int, before: bool) -> None:
    assert gated_norm_of(built(Gated, groups, before)) == GatedNorm(before, "silu", groups, "weight",
                                                                    "variance_epsilon")
    assert gated_norm_of(built(Sigmoid, groups, before)) == GatedNorm(False, "sigmoid", groups, "weight",
                                                                      "variance_epsilon")


@pytest.mark.parametrize("module", [built(Centered), built(Mixing), built(Written), nn.RMSNorm(CHANNELS, eps=1e-5),
                                    nn.Linear(CHANNELS, 1), nn.Bilinear(3, 3, 3)])
def test_nothing_else_is(module: nn.Module) -> None:
    assert gated_norm_of(module) is None


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("groups", "gone", "size"), [(1, [0, 5, 7], 9), (1, [*range(1, 12)], 1), (3, [4, 5, 6, 7], 4),
                                                      (3, [1, 4, 11], 3), (3, [0, 1, 2, 3, 5, 9], 3)])
def test_one_with_fewer_channels_counts_those_that_are_gone_as_zeros(
        groups: int, gone: list[int], size: int, before: bool) -> None:
    dense, (x, gate) = built(Gated, groups, before), inputs()
    kept = [c for c in range(CHANNELS) if c not in gone]
    masked = dense(x.index_fill(-1, torch.tensor(gone), 0), gate)[..., kept]
    small = copy.deepcopy(dense)
    narrow(small, torch.tensor(gone))
    assert type(small) is Gated
    assert dense.variance_epsilon == 1e-4
    small.size = size  # which surgery changes where it has to
    torch.testing.assert_close(small(x[..., kept], gate[..., kept]), masked)


def test_channels_go_again() -> None:
    dense, (x, gate) = built(), inputs()
    small = copy.deepcopy(dense)
    for gone in ([1, 2, 8], [0, 4]):  # of twelve, then of nine
        narrow(small, torch.tensor(gone))
        small.size -= len(gone)
    masked = dense(x.index_fill(-1, torch.tensor([0, 1, 2, 6, 8]), 0), gate)
    kept = [3, 4, 5, 7, 9, 10, 11]
    torch.testing.assert_close(small(x[..., kept], gate[..., kept]), masked[..., kept])


def test_groups_that_would_be_wider_than_others_are_refused() -> None:
    with pytest.raises(ValueError, match="3 groups of channels"):
        narrow(built(Gated, 3), torch.tensor([0]))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_of_statistics_are_those_of_autograd(groups: int, before: bool) -> None:
    """By what a factor on each channel does there alone."""
    norm, (x, gate) = built(Gated, groups, before), inputs()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factors = torch.ones_like(x, requires_grad=True)
    y = norm(x * factors, gate) / factors
    (expected,) = torch.autograd.grad((y * weights).sum(), factors)
    read, factor = gated_norms.statistics(norm, (x,), {"gate": gate})
    found = gradient_of_statistics(norm, read, weights if factor is None else weights * factor)
    torch.testing.assert_close(found * read, expected)


def test_a_call_without_a_gate_is_a_plain_one() -> None:
    norm, (x, _) = built(), inputs()
    assert gated_norms.elementwise(norm, (x,), {}) is None
    assert gated_norms.statistics(norm, (x,), {}) == (x, None)
