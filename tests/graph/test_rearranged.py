"""Channels that are padded, gated, shuffled, or laid beside what no layer made: found, scored and removed."""

import oracles
import pytest
import torch
from networks import REARRANGED
from oracles import untouched
from thinned import thinned

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace

NAMES = list(REARRANGED)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_written_by_hand(name: str) -> None:
    network = REARRANGED[name]
    model = network.model()
    with untouched(model):
        graph = trace(model, network.inputs())
    assert {group.name for group in graph.groups} == set(network.groups)
    assert network.skipped <= set(graph.skipped)
    for group in graph.groups:
        spec = network.groups[group.name]
        assert tuple(group.unit.tolist()) == (spec.units or tuple(range(spec.channels)))
        assert tuple(member.layer for member in group.role("producer")) == spec.producers
        assert {member.layer: [member.index[member.channel == c].tolist() for c in range(group.channels)]
                for member in group.role("consumer")} == \
            {layer: [list(position) for position in positions] for layer, positions in spec.edges.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_of_every_channel_is_that_of_brute_force(name: str) -> None:
    network = REARRANGED[name]
    model, x = network.model(), network.inputs()
    v = torch.randn(model(x).shape, dtype=torch.float64)
    scorer = Scorer(model, x, importance="taylor", normalize=False)
    ours = oracles.sums_of_each_sample(scorer, model, x, v)
    for group, spec in network.groups.items():
        torch.testing.assert_close(ours[group], oracles.sums(model, spec, x, v), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "share"), thinned(NAMES, [0.8, 0.5, 0.3]))
def test_the_smaller_model_is_the_masked_one(name: str, share: float) -> None:
    network = REARRANGED[name]
    model, x = network.model(), network.inputs()
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=share, compensate=False)
    gone = {group: index.tolist() for group, index in result.removed.items()}
    assert gone
    torch.testing.assert_close(result.model(x), oracles.masked(network, model, gone, x), rtol=1e-9, atol=1e-12)
