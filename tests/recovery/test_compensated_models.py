"""Compensated models: what they cost, that they are ordinary, and what is said where there is no mean."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs
from fastscore.recovery.compensation import add_to_biases

RESIDUAL = NETWORKS["residual"]


# Costs

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_predicted_parameters_are_those_of_the_compensated_model(name: str, seed: int) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(2)
    graph = trace(model, x)
    costs = Costs(model, graph.groups, x, compensate=True)
    assert costs.totals["params"] == sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for group in graph.groups:
        gone = torch.rand(int(group.unit.max()) + 1, generator=generator) < 0.3
        gone[int(torch.randint(len(gone), (1,), generator=generator))] = False
        if gone.any():
            removed[group.name] = gone[group.unit].nonzero().flatten()
            costs.remove(group.name, removed[group.name].tolist())
    pruned = copy.deepcopy(model)
    losing = {layer for group, index in removed.items() for layer, places in network.groups[group].edges.items()
              if any(places[c] for c in index.tolist())}
    add_to_biases(pruned, {layer: torch.ones(getattr(module, "out_channels", None) or module.out_features)
                           for layer in losing for module in [model.get_submodule(layer)]})
    remove_channels(pruned, graph.groups, removed)
    assert costs.totals["params"] == pytest.approx(sum(p.numel() for p in pruned.parameters()), rel=1e-12)
    for group, index in removed.items():
        costs.restore(group, index.tolist())
    assert costs.totals == pytest.approx(costs.dense, rel=1e-12)


@pytest.mark.parametrize("budget", [{"params": 0.9}, {"params": 0.5}, {"params": 0.35}, {"macs": 0.6, "params": 0.55}])
@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "grouped", "chunked", "squeeze-excite"])
def test_the_budget_holds_with_the_new_biases_and_the_report_is_the_truth(name: str, budget: dict[str, float]) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, compensate=True, **budget)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    assert result.report.params == (before, after)
    assert after <= budget["params"] * before
    for group, index in result.removed.items():
        for layer, places in network.groups[group].edges.items():
            assert result.model.get_submodule(layer).bias is not None or not any(places[c] for c in index.tolist())
    counted: set[str] = set()
    for row, group in zip(result.report.groups, trace(model, x).groups, strict=True):
        own = {member.layer for member in group.members if member.role != "consumer"} - counted
        counted |= own
        assert row.params == tuple(sum(p.numel() for layer in own for p in m.get_submodule(layer).parameters())
                                   for m in (model, result.model))


# The model afterwards

def test_new_biases_follow_their_weights_and_old_ones_stay_as_they_were() -> None:
    model, x = NETWORKS["plain"].model().to(torch.bfloat16), NETWORKS["plain"].inputs(3).to(torch.bfloat16)
    residual = RESIDUAL.model().to(torch.bfloat16).train()
    residual.block2.conv2.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    for module in (model, residual):
        scores = fastscore.score(module, [x], progress=False)
        result = fastscore.prune(module, scores, x, channels=0.5, compensate=True).model
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        for name, parameter in result.named_parameters():
            assert parameter.requires_grad == flags.get(name, flags.get(name.removesuffix("bias") + "weight"))
            assert parameter.dtype == torch.bfloat16
            assert type(parameter) is nn.Parameter
        assert {name: m.training for name, m in result.named_modules()} == \
            {name: m.training for name, m in module.named_modules()}
    assert result.block2.conv2.bias is not None
    assert not result.block2.conv2.bias.requires_grad


def test_the_users_hooks_see_what_they_will_see_after_surgery() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    for layer in (model.block1.conv1, model.block2.conv2, model.head.fc):
        layer.register_forward_hook(lambda module, args, output: output.square())
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, compensate=True):
        masked = model(x)
    torch.testing.assert_close(fastscore.prune(model, scores, x, channels=0.5, compensate=True).model(x), masked,
                               rtol=1e-10, atol=1e-12)


def test_nothing_removed_is_nothing_changed() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, params=1.0, compensate=True)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert torch.equal(result.model(x), model(x))


# When nobody says whether to

@pytest.mark.parametrize(("options", "holds"), [
    ({}, True), ({"importance": "molchanov-group"}, True), ({"importance": "magnitude-l2"}, False),
    ({"importance": "taylor-abs", "reduction": "element"}, False)])
def test_scores_that_hold_means_compensate(options: dict[str, Any], holds: bool) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False, **options)
    found, said = (fastscore.prune(model, scores, x, channels=0.6, **how) for how in ({}, {"compensate": holds}))
    assert torch.equal(found.model(x), said.model(x))
    assert replace(found.report, compensation=said.report.compensation) == said.report  # which says why
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, x):
        masked = model(x)
    torch.testing.assert_close(masked, found.model(x), rtol=1e-10, atol=1e-12)
    plain = fastscore.prune(model, scores, x, channels=0.6, compensate=False)
    assert torch.equal(plain.model(x), found.model(x)) != holds


# Without the means

def damaged(scores: fastscore.Scores, layer: str, mean: Tensor | None) -> fastscore.Scores:
    means = {name: value for name, value in scores.means.items() if name != layer}
    return replace(scores, means=means if mean is None else {**means, layer: mean})


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda s, m, x: fastscore.score(m, [x], importance="magnitude-l1", progress=False), ValueError,
     r"^compensate: .*'magnitude-l1'.*taylor.*dataclasses\.replace"),
    (lambda s, m, x: fastscore.score(m, [x], reduction="element", progress=False), ValueError,
     r"^compensate: .*'element'.*dataclasses\.replace"),
    (lambda s, m, x: damaged(s, "head.fc", None), ValueError, r"^head\.fc: .*no mean activations.*7 channels"),
    (lambda s, m, x: damaged(s, "head.fc", torch.ones(6)), ValueError, r"^head\.fc: .*\(6,\).*7 channels"),
    (lambda s, m, x: damaged(s, "block2.conv2", torch.full((8,), math.nan)), FloatingPointError,
     r"^block2\.conv2: NaN"),
])
def test_means_that_are_missing_or_wrong(change: Callable[..., fastscore.Scores], error: type[Exception],
                                         message: str) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = change(fastscore.score(model, [x], progress=False), model, x)
    for act in (lambda: fastscore.prune(model, scores, x, channels=0.4, scope="layer", compensate=True),
                lambda: fastscore.prune(model, scores, x, channels=0.4, scope="layer", compensate=True, inplace=True),
                lambda: fastscore.mask(model, scores, 0.6, x, scope="layer", compensate=True).__enter__()):
        with untouched(model), pytest.raises(error, match=message):
            act()
    assert fastscore.prune(model, scores, x, channels=0.4, compensate=False).report.channels[1] <= 0.4 * 26
