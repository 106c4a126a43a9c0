"""MACs that are told are those that run, for one sample, against closed forms: wherever samples lie, and in whatever
search."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.pruning import latency
from fastscore.pruning.report import Timing

TOKENS, WIDTH = 40, 16


class Graph(nn.Module):
    """A graph convolution: products of activations shrink with the widths, beside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.softmax(x @ x.transpose(1, 2), -1)
        return self.last((a @ self.two((a @ self.one(x)).relu())).relu().mean(1))


def by_hand(model: nn.Module) -> int:
    one, two, t = model.one.out_features, model.two.out_features, TOKENS
    return 5 * t * t + t * 5 * one + t * t * one + t * one * two + t * t * two + 3 * two


@pytest.fixture(scope="module")
def scored() -> tuple[nn.Module, fastscore.Scores, Tensor]:
    torch.manual_seed(0)
    model, x = Graph().eval(), torch.randn(2, TOKENS, 5)
    return model, fastscore.score(model, [x], progress=False), x


def test_a_search_by_quality_tells_what_each_network_costs(scored: tuple[nn.Module, fastscore.Scores, Tensor]) -> None:
    model, scores, x = scored
    batches = [torch.randn(8, TOKENS, 5) for _ in range(4)]
    result = fastscore.prune(model, scores, x, kl=1e-4, calibration=batches)
    rows = result.report.judged
    chosen = next(row for row in rows if row.chosen)
    assert len(rows) > 2
    assert chosen.macs == by_hand(result.model) / by_hand(model) == result.report.macs[1] / result.report.macs[0] < 1


def test_a_search_by_time_tells_what_each_network_costs(scored: tuple[nn.Module, fastscore.Scores, Tensor],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    model, scores, x = scored
    tried = {}

    def time_pair(dense: Any, other: Any, *rest: object) -> Timing:
        share = by_hand(other.args[0]) / by_hand(model)
        tried[share] = other
        return Timing((1.0, share), 0.0)

    monkeypatch.setattr(latency, "time_pair", time_pair)
    result = fastscore.prune(model, scores, x, latency=0.5)
    assert sorted(row.macs for row in result.report.candidates) == sorted(tried)
    assert next(row.macs for row in result.report.candidates if row.chosen) == by_hand(result.model) / by_hand(model)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_samples_that_lie_second(samples: int) -> None:
    """nn.TransformerEncoder as it is by default, [T, N, C]; a batch of one too."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), 2).eval()
    x, tokens = torch.randn(5, samples, 6), 5
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    result = fastscore.prune(model, scores, x, macs=0.8)

    def of_layers(hidden: list[int]) -> int:
        return sum(4 * 6 * 6 * tokens + 2 * tokens * tokens * 6 + 2 * 6 * width * tokens for width in hidden)

    small = [layer.linear1.out_features for layer in result.model.layers]
    if samples > 1:
        assert trace(model, x).samples.batch == 1
        assert result.report.macs[0] == of_layers([8, 8])
        if all(layer.self_attn.num_heads == 2 for layer in result.model.layers):
            assert result.report.macs[1] == of_layers(small)
    assert result.report.macs[1] / result.report.macs[0] <= 0.8
