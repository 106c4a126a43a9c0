"""Networks that lost residual branches, repaired: units="blocks" with what can be tried on channels."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from oracles import untouched
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.modules.zero_branch import ZeroBranch
from fastscore.recovery.reconstruct import Method


class Residual(nn.Module):
    """A branch that is added to the stream it reads, scaled."""

    def __init__(self, width: int, scale: float, plain: bool) -> None:
        super().__init__()
        norm = nn.Identity() if plain else nn.BatchNorm1d(width)
        self.branch, self.scale = nn.Sequential(nn.Linear(8, width), norm, nn.Tanh(), nn.Linear(width, 8)), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Around(nn.Module):
    """Two branches, the second added to what is there before the first, which is met there first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(x + 0.1 * self.one(x))


def network(*scales: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *(Residual(6 + i, scale, bool(i % 2)) for i, scale in enumerate(scales)),
                         Around(), nn.Linear(8, 5)).double().eval()


def zeroed(scores: fastscore.Scores, branches: tuple[str, ...]) -> fastscore.Scores:
    """These branches go first."""
    return replace(scores, totals={name: total * (name not in branches) for name, total in scores.totals.items()})


def without(model: nn.Module, *branches: str) -> tuple[fastscore.PruneResult, list[Tensor]]:
    """The model without these branches and some channels of each layer, and batches to repair it on."""
    batches = list(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).double().split(16))
    scores = fastscore.score(model, batches, units="blocks", progress=False)
    result = fastscore.prune(model, zeroed(scores, branches), batches[0], params=0.45, cost_aware=False,
                             compensate=False)
    gone = [name for name, module in result.model.named_modules() if isinstance(module, ZeroBranch)]
    assert set(branches) <= set(gone)
    assert set(result.removed) - set(gone)  # channels, too
    return result, batches


@pytest.mark.parametrize(("branches", "method"), thinned(
    [("1.branch",), ("2.branch", "1.branch"), ("3.one",), ("3.two",), ("3.one", "3.two")], get_args(Method)))
def test_every_repair_of_what_is_left(method: Method, branches: tuple[str, ...]) -> None:
    model = network(0.1, 0.3)
    result, batches = without(model, *branches)
    cut = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    with untouched(model):
        repaired = fastscore.reconstruct(model, result, batches, method, progress=False)
    assert all(torch.equal(tensor, cut[name]) for name, tensor in result.model.state_dict().items())
    rows = repaired.report.repairs
    assert [rows[0].name, sum(row.chosen for row in rows)] == ["none", 1]
    if method == "mean":  # as prune() compensates, with the means that the scores hold
        scores = fastscore.score(model, batches, units="blocks", progress=False)
        expected = fastscore.prune(model, zeroed(scores, branches), batches[0], params=0.45, cost_aware=False)
        for name, tensor in expected.model.state_dict().items():
            torch.testing.assert_close(repaired.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    if method in ("asymmetric", "auto"):  # which alone see what a branch gave
        assert next(row for row in rows if row.chosen).kl < rows[0].kl
        x = torch.randn(512, 6, generator=torch.Generator().manual_seed(2)).double()
        with torch.no_grad():  # and on samples that nothing was fitted to
            before, after = ((small(x) - model(x)).square().mean() for small in (result.model, repaired.model))
        assert after < before


def test_a_branch_that_adds_a_constant_is_given_back_by_the_next_layer() -> None:
    """Closed form: what 1.branch adds is the same for all samples, so the next biases that are fitted can hold it."""
    model = network(0.5)
    batches = list(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).double().split(16))
    with torch.no_grad():
        model[1].branch[3].weight.zero_()
    scores = fastscore.score(model, batches, units="blocks", progress=False)
    only = fastscore.prune(model, replace(scores, totals={"1.branch": scores.totals["1.branch"]}), batches[0],
                           params=0.99, compensate=False)
    assert list(only.removed) == ["1.branch"]
    repaired = fastscore.reconstruct(model, only, batches, "asymmetric", progress=False)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        cut, small = ((small(x) - model(x)).abs().max() for small in (only.model, repaired.model))
    assert cut > 0.01
    assert small < 1e-3 * cut


def test_a_smaller_network_without_branches_is_distilled() -> None:
    model = network(0.1, 0.3)
    result, batches = without(model, "1.branch", "3.one")
    told = fastscore.distill(model, result, batches, steps=2, progress=False)
    assert "KL" in str(told)
