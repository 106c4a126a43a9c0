"""Asymmetric reconstruction against least squares on the rows themselves."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.recovery.asymmetric import Joint, error, fit, rewire
from fastscore.recovery.linear import estimate_inputs
from fastscore.recovery.moments import Moments, layouts

QUICK = settings(max_examples=40, deadline=None)
LAYERS = {"linear": lambda: nn.Linear(8, 6), "conv": lambda: nn.Conv2d(8, 6, 1, groups=2),
          "transposed": lambda: nn.ConvTranspose2d(8, 6, 1, groups=2)}
REMOVED = torch.tensor([1, 3, 5, 6])  # two of each block


class Case:
    """A layer of one position, what it reads in the dense network (x) and in the smaller one (y), in two parts."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.layer = LAYERS[name]().double()
        (self.index,) = layouts(nn.Sequential(self.layer), (), ["0"]).values()
        self.kept = torch.tensor([c for c in range(8) if c not in REMOVED])
        mix = torch.randn(8, 8, dtype=torch.float64)
        self.x = torch.randn(2, 300, 8, dtype=torch.float64) @ mix + torch.randn(8, dtype=torch.float64)
        self.y = (self.x + 0.3 * torch.randn_like(self.x))[..., self.kept] + 0.5
        self.parts = [Joint(self.index, REMOVED) for _ in range(2)]
        self.dense = Moments(self.index)
        for joint, x, y in zip(self.parts, self.x, self.y, strict=True):
            for a, b in zip(x.split(70), y.split(70), strict=True):
                joint.add(a, b)
                self.dense.add(a)

    def outputs(self, rows: Tensor, layer: nn.Module | None = None) -> Tensor:
        layer = layer or self.layer
        with torch.no_grad():
            return layer(rows) if isinstance(layer, nn.Linear) else layer(rows[:, :, None, None])[..., 0, 0]

    def full(self, mixing: Tensor) -> Tensor:
        """[8, 4], of all blocks."""
        whole = torch.zeros(8, 4, dtype=torch.float64)
        blocks = len(mixing)
        for block in range(blocks):
            rows = slice(block * 8 // blocks, (block + 1) * 8 // blocks)
            whole[rows, block * 4 // blocks:(block + 1) * 4 // blocks] = mixing[block]
        return whole


@QUICK
@given(st.sampled_from(list(LAYERS)), st.integers(0, 2**31))
def test_without_a_ridge_it_is_least_squares(name: str, seed: int) -> None:
    case = Case(name, seed)
    x, y = (rows[0] - rows[0].mean(0) for rows in (case.x, case.y))
    found = case.full(fit(case.parts[0], estimate_inputs(case.dense, REMOVED, 0.1), 0.0))
    blocks = len(case.index)
    for block in range(blocks):
        rows, columns = (slice(block * n // blocks, (block + 1) * n // blocks) for n in (8, 4))
        exact = torch.linalg.lstsq(y[:, columns], x[:, rows]).solution.T
        torch.testing.assert_close(found[rows, columns], exact, rtol=1e-6, atol=1e-6)


@QUICK
@given(st.sampled_from(list(LAYERS)), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, math.inf]))
def test_errors_and_outputs_are_those_of_the_rows(name: str, seed: int, ridge: float) -> None:
    case = Case(name, seed)
    mixing = fit(case.parts[0], estimate_inputs(case.dense, REMOVED, 0.1), ridge)
    whole = case.full(mixing)
    constant = case.x[0].mean(0) - whole @ case.y[0].mean(0)
    errors = case.outputs(case.x[1]) - case.outputs(case.y[1] @ whole.T + constant)
    assert error(case.layer, mixing, *case.parts) == pytest.approx(float(errors.square().sum(1).mean()), rel=1e-6)
    # the layer itself, on what the smaller network gives it: mean and deviation are the dense one's
    new, smaller = rewire(case.layer, case.parts[0], mixing), LAYERS[name]().double()
    with torch.no_grad():
        smaller.weight.copy_(new.weight)
        smaller.bias.copy_(case.layer.bias + case.outputs(new.given[None])[0]
                           - case.layer.bias - new.gain * (case.outputs(new.read[None])[0] - case.layer.bias))
    full = torch.zeros(300, 8, dtype=torch.float64)
    full[:, case.kept] = case.y[0]
    made, expected = case.outputs(full, smaller), case.outputs(case.x[0])
    torch.testing.assert_close(made.mean(0), expected.mean(0), rtol=1e-6, atol=1e-6)
    inside = (new.gain > 0.5) & (new.gain < 2)
    torch.testing.assert_close(made.std(0)[inside], expected.std(0)[inside], rtol=1e-6, atol=1e-6)


def test_an_infinite_ridge_leaves_the_symmetric_solution() -> None:
    case = Case("conv", 0)
    symmetric = estimate_inputs(case.dense, REMOVED, 0.1)
    torch.testing.assert_close(case.full(fit(case.parts[0], symmetric, math.inf)),
                               torch.block_diag(*symmetric.mixing)[:, case.kept])


def test_blocks_that_are_left_with_different_widths_are_told_beforehand() -> None:
    index = torch.arange(8).reshape(2, 1, 4)
    assert Joint.possible(index, REMOVED)
    assert not Joint.possible(index, torch.tensor([0, 1, 4]))
    assert not Joint.possible(index, torch.arange(8))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_on_every_network(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(24)
    batches = list(x.split(8))
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    result = fastscore.prune(model, scores, x[:1], channels=0.6)
    kept: dict[str, Any] = {key: value.clone() for key, value in result.model.state_dict().items()}
    with untouched(model):
        repaired = fastscore.reconstruct(model, result, batches, method="asymmetric")
    assert all(torch.equal(value, kept[key]) for key, value in result.model.state_dict().items())
    assert [row.name for row in repaired.report.repairs] == ["none", "asymmetric"]
    assert torch.isfinite(repaired.model(x)).all()
    assert not any(module._forward_pre_hooks for module in repaired.model.modules())
