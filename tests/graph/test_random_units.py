"""Residual branches, whole experts, whole heads and dimensions of heads of random networks, scored and removed: against
gates by brute force.

A few networks in a normal run; FASTSCORE_NIGHTLY=1 makes it 100 of each, and FASTSCORE_FIRST_SEED=n begins at another.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from random_networks import generate
from random_program import RandomNetwork
from torch import Tensor, nn
from torch.func import functional_call

import fastscore
from fastscore.graph import scored_units
from fastscore.graph.blocks import with_blocks
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.tracing import trace

FIRST = int(os.environ.get("FASTSCORE_FIRST_SEED", "0"))
SEEDS = range(FIRST, FIRST + 100) if os.environ.get("FASTSCORE_NIGHTLY") else (FIRST + 21, FIRST + 30)


def without_branch(model: nn.Module, group: ChannelGroup, x: Tensor, gate: Tensor) -> Tensor:
    """The output where what the branch adds is multiplied by the gate [N]."""
    last = model.get_submodule(next(group.role("branch")).layer)
    handle = last.register_forward_hook(lambda module, args, y: y * gate.view(-1, *[1] * (y.dim() - 1)))
    try:
        return model(x)
    finally:
        handle.remove()


def without_dimensions(model: nn.Module, gates: list[tuple[ChannelGroup, Tensor]], x: Tensor) -> Tensor:
    """The output where queries, and what reads values, are multiplied by the gates [C] of their channels:
    rows of weights and biases, and columns."""
    held = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for member, gate in [(member, gate) for group, gate in gates for member in group.role("query", "consumer")]:
        name = member.layer if member.layer in held else f"{member.layer}.weight"
        weight = changed.get(name, held[name])
        rows = member.role == "query"
        factors = torch.ones(weight.shape[0 if rows else 1], dtype=x.dtype).index_put(
            (member.index,), gate[member.channel])
        changed[name] = weight * (factors[:, None] if rows else factors)
        owner = name.rpartition(".")[0]
        bias = f"{owner}.in_proj_bias" if f"{owner}.in_proj_bias" in held else f"{owner}.bias"  # of all three
        if rows:
            whole = torch.ones_like(held[bias])
            whole[:len(factors)] = factors
            changed[bias] = changed.get(bias, held[bias]) * whole
    return functional_call(model, changed, (x,))


def without_experts(model: nn.Module, group: ChannelGroup, gate: Tensor, x: Tensor) -> Tensor:
    """The output where what experts make is multiplied by the gates [E]."""
    name = f"{group.name}.down_proj"
    return functional_call(model, {name: model.get_parameter(name) * gate[:, None, None]}, (x,))


def never_chosen(model: nn.Module, groups: list[ChannelGroup], removed: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output by the definition of mixtures whose routers never choose the experts of `removed`."""
    owners = {group.name: model.get_submodule(group.name.rpartition(".")[0]) for group in groups}
    for name, owner in owners.items():
        owner.gone = removed.get(name, torch.tensor([])).tolist()
    try:
        return model(x)
    finally:
        for owner in owners.values():
            owner.gone = []


def sums(model: nn.Module, group: ChannelGroup, x: Tensor, v: Tensor) -> Tensor:
    """s [N, C]."""
    if any(group.role("branch")):
        gate = torch.ones(len(x), dtype=x.dtype, requires_grad=True)
        return torch.autograd.grad((without_branch(model, group, x, gate) * v).sum(), gate)[0][:, None]
    rows = []
    for one, direction in zip(x.split(1), v.split(1), strict=True):
        gate = torch.ones(group.channels, dtype=x.dtype, requires_grad=True)
        # twice: of one sample alone, PyTorch's BatchNorm on a CPU sends a wrong gradient back to tokens
        twice = torch.cat((one, one))
        output = without_experts(model, group, gate, twice) if any(group.role("expert")) else \
            without_dimensions(model, [(group, gate)], twice)
        rows.append(torch.autograd.grad((output[:1] * direction).sum(), gate)[0])
    s = torch.stack(rows)
    return torch.stack([s[:, group.unit == unit].sum(1) for unit in group.unit], 1)


def masked(model: nn.Module, groups: list[ChannelGroup], removed: dict[str, Tensor], x: Tensor) -> Tensor:
    if any(groups[0].role("branch")):
        (group,) = groups
        return without_branch(model, group, x, torch.zeros(len(x), dtype=x.dtype))
    if any(groups[0].role("expert")):
        return never_chosen(model, groups, removed, x)
    return without_dimensions(model, [(group, torch.ones(group.channels, dtype=x.dtype).index_fill(
        0, removed[group.name], 0)) for group in groups if group.name in removed], x)


def check(network: RandomNetwork, units: str, of: Callable[[Any], tuple[ChannelGroup, ...]]) -> bool:
    """Whether the network has any of these units; each is scored, and removed alone, by brute force."""
    model, x = network.model, network.inputs()
    with oracles.untouched(model):
        graph = trace(model, x, units=units)
    with torch.no_grad():
        z = model(x)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(network.seed), dtype=x.dtype)
    if not of(graph):
        return False
    with oracles.untouched(model):
        scores = fastscore.score(model, [x], units=units, gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, batch: (output * v).sum())
    found = [group for group in of(graph) if group.name in scores]
    lost = 1e-14 * float((v * z).abs().flatten(1).sum(1).max())  # of s, all that is left where norms take the rest
    for group in found:
        want = sums(model, group, x, v).square().mean(0)
        torch.testing.assert_close(scores[group.name].double(), want, rtol=1e-5,
                                   atol=network.rounding * float(want.max()) + lost ** 2 + 1e-37)
        alone = replace(scores, totals={group.name: scores.totals[group.name]})
        budget = {"params": 0.999} if any(group.role("branch")) else {"channels": 0.5}
        with oracles.untouched(model):
            result = fastscore.prune(model, alone, x[:1], scope="layer", compensate=False, progress=False, **budget)
        assert list(result.removed) == [group.name]
        with torch.no_grad():
            want = masked(model, [group], result.removed, x)
            torch.testing.assert_close(result.model(x), want, rtol=network.rounding,
                                       atol=network.rounding * float(want.abs().max()) + 1e-30)
    if units == "heads_and_dims" and found:
        both = replace(scores, totals={group.name: scores.totals[group.name] for group in found})
        result = fastscore.prune(model, both, x[:1], channels=0.6, compensate=False, progress=False)
        with torch.no_grad():
            want = masked(model, found, result.removed, x)
            torch.testing.assert_close(result.model(x), want, rtol=1e-9, atol=1e-9 * float(want.abs().max()) + 1e-30)
    return bool(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_branches(seed: int) -> None:
    check(generate(seed), "blocks", lambda graph: tuple(group for group in with_blocks(graph).groups
                                                        if any(group.role("branch"))))


@pytest.mark.parametrize("seed", SEEDS)
def test_experts(seed: int) -> None:
    """Each mixture alone; and under budgets with the channels of all layers, which count what is there."""
    network = generate(seed, experts=True)
    if not check(network, "experts", lambda graph: graph.experts):
        return
    model, x = network.model, network.inputs()
    scores = fastscore.score(model, [x], units="experts", progress=False)
    for budget in ({"params": 0.7}, {"macs": 0.7}):
        with oracles.untouched(model):
            try:
                result = fastscore.prune(model, scores, x[:1], compensate=False, progress=False, **budget)
            except ValueError as error:
                if "cannot be reached" not in str(error):
                    raise
                continue
        assert result.report.params[1] == sum(parameter.numel() for parameter in result.model.parameters())
        assert result.report.macs[1] == fastscore.prune(result.model, fastscore.score(
            result.model, [x], progress=False), x[:1], channels=1.0, progress=False).report.macs[0]
        (before, after), share = next((getattr(result.report, key), value) for key, value in budget.items())
        assert after <= share * before


def test_a_branch_with_a_gate() -> None:
    """Whose zeros are twice as wide before it."""
    assert check(generate(57, kinds=True), "blocks", lambda graph: graph.blocks)


@pytest.mark.parametrize("seed", SEEDS)
def test_dimensions_of_heads(seed: int) -> None:
    check(generate(seed, more=True), "head_dims", lambda graph: graph.head_dims)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["more", "kinds", "attentions", "adapted"])
def test_whole_heads_and_their_dimensions(seed: int, kind: str) -> None:
    """PyTorch's own attention, attention whose projections are layers, in windows, turned, and of heads that talk."""
    network = generate(seed, **{kind: True})
    check(network, "heads_and_dims", lambda graph: tuple(
        group for group in scored_units.of_graph(network.model, graph, "heads_and_dims").groups
        if any(group.role("heads", "head_dims"))))


def test_dimensions_that_code_turns_stay_however_little_queries_change() -> None:
    """Their products are so small here that weights are all but even."""
    network = generate(11, adapted=True)
    graph = trace(network.model, network.inputs(), units="heads_and_dims")
    assert graph.head_dims == ()
    assert graph.whole_heads.keys() == {"layers.shared1.q_proj", "layers.shared3.q_proj"}


def test_experts_that_run_to_no_end_stay() -> None:
    network = generate(1015, experts=True)
    graph = trace(network.model, network.inputs(), units="experts")
    assert graph.experts == ()
    assert set(graph.kept_whole["experts"].values()) == {"no gradient of the output comes back to them"}
