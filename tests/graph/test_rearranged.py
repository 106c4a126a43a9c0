"""Channels that are padded, gated, shuffled, or laid beside what no layer made: scored and removed."""

import oracles
import pytest
import torch
from networks import REARRANGED
from thinned import thinned

import fastscore
from fastscore import Scorer

NAMES = list(REARRANGED)


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
