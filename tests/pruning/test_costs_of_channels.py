"""Importance per cost: where it is the default, and what a channel costs."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import params
from torch import Tensor, nn

import fastscore
from fastscore.graph.cutting.surgery import remove_indices, removed_indices
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs, total_macs
from fastscore.pruning.budgets.layer_times import layer_seconds
from fastscore.pruning.order import ranking
from fastscore.pruning.order.ranking import channel_costs, time_costs

MODEL, X = NETWORKS["mobile"].traced(), NETWORKS["mobile"].inputs(6)


def removed(scores: fastscore.Scores, **options: Any) -> Mapping[str, list[int]]:
    return {name: index.tolist() for name, index in fastscore.prune(MODEL, scores, X, **options).removed.items()}


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.5}, {"macs": 0.5, "channels": 0.7}])
@pytest.mark.parametrize("how", [{"importance": "taylor-sq"}, {"importance": "taylor-abs"}, {"ablation": "mean"}])
def test_where_outputs_are_measured_and_costs_are_limited_importance_counts_per_cost(
        how: dict[str, str], budget: dict[str, float]) -> None:
    scores = fastscore.score(MODEL, [X], progress=False, **how)  # type: ignore[arg-type]
    assert removed(scores, **budget) == removed(scores, cost_aware=True, **budget)
    assert removed(scores, **budget) != removed(scores, cost_aware=False, **budget)


@pytest.mark.parametrize(("how", "budget"), [
    ({"importance": "magnitude-l2"}, {"macs": 0.5}), ({"importance": "bn-scale"}, {"params": 0.5}),
    ({"layerwise": "l2"}, {"macs": 0.5}), ({}, {"channels": 0.6}), ({}, {"macs": 0.5, "scope": "layer"})])
def test_elsewhere_it_does_not(how: dict[str, str], budget: dict[str, Any]) -> None:
    scores = fastscore.score(MODEL, [X], progress=False, **how)  # type: ignore[arg-type]
    assert removed(scores, **budget) == removed(scores, cost_aware=False, **budget)


def test_time_is_a_cost_too() -> None:
    """A layer's measured time is shared out as its MACs are."""
    costs = Costs(MODEL, trace(MODEL, X).groups, X)
    macs = {name: layer.macs for name, layer in costs.layers.items()}
    found, expected = time_costs(costs, {name: 3 * value for name, value in macs.items()}), channel_costs(costs, "macs")
    assert {name: layer.macs for name, layer in costs.layers.items()} == macs
    for name, value in expected.items():
        torch.testing.assert_close(found[name], 3 * value)


def test_a_latency_alone_is_ranked_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all time goes into one layer, so that only its channels are worth removing."""
    monkeypatch.setattr(ranking, "layer_seconds", lambda model, names, x, forward:
                        {name: 1.0 if name == slow else 1e-9 for name in names})
    scores = fastscore.score(MODEL, [X], progress=False)
    equal = replace(scores, totals={name: torch.ones_like(total) for name, total in scores.totals.items()})
    for slow in list(scores)[:2]:
        costs = Costs(MODEL, trace(MODEL, X).groups, X)
        order = ranking.rank(MODEL, trace(MODEL, X).groups, equal, costs, ranking.Budgets(latency=0.5),
                             ranking.Ranking(), X, lambda model, x: model(x))
        assert slow in {order[0].group, *(member.layer for group in trace(MODEL, X).groups
                                          if group.name == order[0].group for member in group.members)}


def test_seconds_of_layers_leave_out_the_layers_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("fastscore.pruning.budgets.layer_times.time", clock)

    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 2.0
            return super().forward(x)

    model = nn.Sequential(nn.Sequential(Slow(3, 3), nn.ReLU()), Slow(3, 3))
    seconds = layer_seconds(model, ["0", "0.0", "1"], torch.ones(1, 3), lambda model, x: model(x))
    assert seconds == {"0": 1e-9, "0.0": 2.0, "1": 2.0}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "grouped", "unet", "chunked", "flattening"])
@pytest.mark.parametrize("compensate", [False, True])
def test_the_price_of_a_channel_is_what_its_surgery_saves(name: str, compensate: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(2)
    groups = trace(model, x).groups
    costs = Costs(model, groups, x, compensate=compensate)
    for unit, count in (("macs", lambda m: total_macs(m, x)), ("params", params)):
        prices = channel_costs(costs, unit)  # type: ignore[arg-type]
        assert costs.totals == costs.dense
        for each in groups:
            first = each.unit == each.unit[0]
            small = remove_indices(copy.deepcopy(model), removed_indices(groups, {each.name: first.nonzero()[:, 0]}))
            assert float(prices[each.name][first].sum()) == pytest.approx(count(model) - count(small), rel=1e-9)
    assert any(layer.bias_below for layer in costs.layers.values()) == \
        (compensate and name not in ("flattening", "unet"))


def test_cost_aware_pruning_keeps_more_channels_within_the_same_budget() -> None:
    """All channels are as important but for a trace, by which those that cost least go first without costs."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    for unit in ("macs", "params"):
        prices = channel_costs(Costs(model, trace(model, x).groups, x), unit)  # type: ignore[arg-type]
        equal = replace(scores, totals={layer: 1 + 1e-9 * price for layer, price in prices.items()})
        plain, aware = (fastscore.prune(model, equal, x, cost_aware=aware, **{unit: 0.5}).report  # type: ignore[arg-type]
                        for aware in (False, True))
        assert aware.channels[1] > plain.channels[1]
        assert getattr(aware, unit)[1] / getattr(aware, unit)[0] <= 0.5
