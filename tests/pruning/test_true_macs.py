"""MACs that are told are those that run, for one sample, against closed forms: wherever samples lie, and in whatever
search."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.macs.counting import count
from fastscore.pruning import surgery
from fastscore.pruning.budgets import costs, latency, quality
from fastscore.pruning.budgets.selection import MacsLeft
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


class Watched(nn.Module):
    """A product that grows with two widths at once, of which a layer's inputs know nothing: no sum over channels
    foresees it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 24), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        z = self.two(y).relu()
        with torch.no_grad():
            assert (y.mT @ z).isfinite().all()
        return self.last(z).mean(1)


def macs_of(model: nn.Module) -> int:
    one, two, t = model.one.out_features, model.two.out_features, 7
    return t * (5 * one + 2 * one * two + 3 * two)


def test_a_search_by_quality_walks_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network that it tries halves, in true MACs, what is left between the smallest that held and the largest
    that did not; and the one that is returned is the last that holds."""
    torch.manual_seed(0)
    model, x = Watched().eval(), torch.randn(2, 7, 5)
    scores = fastscore.score(model, [x], progress=False)
    seen: dict[str, Any] = {"tried": []}
    own = quality.select_by_quality

    def watched(macs: MacsLeft, build: Callable[[int], fastscore.PruneResult], *rest: Any,
                finer: Any) -> Any:
        def noted(steps: int) -> fastscore.PruneResult:
            seen["tried"].append(steps)
            return build(steps)

        found = own(macs, noted, *rest, tolerance=0.0)
        seen.update(true=[macs_of(build(steps).model) for steps in range(len(macs))], foreseen=macs._foreseen)
        return found

    monkeypatch.setattr("fastscore.pruning.prune.select_by_quality", watched)
    result = fastscore.prune(model, scores, x, kl=5e-5, repair="mean", compensate=None,
                             calibration=[torch.randn(8, 7, 5) for _ in range(4)])
    true, foreseen = seen["true"], seen["foreseen"]
    assert true[0] == foreseen[0] == macs_of(model)
    assert foreseen[-1] < 0 < true[-1]  # far off
    assert true == sorted(set(true), reverse=True)
    judged = {round(row.macs * true[0]): row for row in result.report.judged}
    assert {true[steps] for steps in seen["tried"]} - {true[0]} == set(judged)
    assert all(row.macs == macs / true[0] for macs, row in judged.items())
    low, high = 0, len(true)
    for steps in dict.fromkeys(step for step in seen["tried"] if step):
        middle = (true[low] + true[min(high, len(true) - 1)]) / 2
        halving = next(count for count, macs in enumerate(true) if macs <= middle)
        assert steps == min(halving, high - 1)
        low, high = (steps, high) if judged[true[steps]].kl <= 5e-5 else (low, steps)
    assert high == low + 1
    assert macs_of(result.model) == result.report.macs[1] == true[low]
    assert 0 < low < len(true) - 1
    assert judged[true[low]].chosen
    assert judged[true[high]].kl > 5e-5  # the next step up fails


@pytest.mark.parametrize("percent", [41, 47])
def test_a_budget_is_missed_by_less_than_any_channel(percent: int) -> None:
    """By what is counted, where sums over channels foresee more than there is, or less."""
    torch.manual_seed(0)
    model, x = Watched().eval(), torch.randn(2, 7, 5)
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    limit = percent / 100 * macs_of(model)
    small = fastscore.prune(model, scores, x, macs=percent / 100, compensate=False, progress=False).model
    one, two = small.one.out_features, small.two.out_features
    assert macs_of(small) <= limit
    for more in (one + 1, two), (one, two + 1):
        assert more[0] > 24 or more[1] > 20 or 7 * (5 * more[0] + 2 * more[0] * more[1] + 3 * more[1]) > limit


class Plain(nn.Sequential):
    """Its MACs are those of its layers."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 20, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(320, 3))


@pytest.mark.parametrize(("build", "size", "most"), [(Plain, (3, 8, 8), 5), (Watched, (7, 5), 99)])
def test_models_are_cut_and_counted_a_few_times(build: Callable[[], nn.Module], size: tuple[int, ...], most: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense one; without a channel of each group; at the budget, with what came back; and what is returned."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, *size)
    scores = fastscore.score(model, [x], progress=False)
    counts = list[int]()

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = count(*args, **kwargs)
        counts.append(found.macs)
        return found

    monkeypatch.setattr(costs, "count", counting)
    monkeypatch.setattr(surgery, "count", counting)
    for percent in range(30, 90, 7):
        counts.clear()
        result = fastscore.prune(model, scores, x, macs=percent / 100, progress=False)
        assert len(counts) <= most
        assert counts[-1] == count(result.model, x).macs == result.report.macs[1] <= percent / 100 * counts[0]


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


class LowRank(nn.Linear):
    """Its weight is the frozen one and a product, as of an adapter that was not merged."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.randn(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + (self.b @ self.a).sigmoid() @ self.a.t() @ self.a, self.bias)


class LowRankConv(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs * kernel**2)), nn.Parameter(torch.randn(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + (self.b @ self.a).view_as(self.weight), self.bias)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("images", [False, True])
def test_computing_a_weight_counts_neither_before_nor_after(samples: int, images: bool) -> None:
    torch.manual_seed(0)
    if images:
        layers = [nn.Conv2d(5, 8, 1), LowRankConv(8, 8, 1), nn.Conv2d(8, 8, 1), LowRankConv(8, 8, 1)]
        head: list[nn.Module] = [nn.Flatten(), nn.Linear(8, 3)]
    else:
        layers, head = [nn.Linear(5, 8), LowRank(8, 8), nn.Linear(8, 8), LowRank(8, 8)], [nn.Linear(8, 3)]
    model = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())), *head).eval()
    x = torch.randn(samples, 5, 1, 1) if images else torch.randn(samples, 5)

    def products(model: nn.Module) -> int:
        return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))

    scores = fastscore.score(model, [torch.cat([x, x + 1, x - 2])], progress=False)
    for share in (0.95, 0.8):
        result = fastscore.prune(model, scores, x, macs=share, progress=False)
        dense, left = result.report.macs
        assert (dense, left) == (products(model), products(result.model))
        assert left <= share * dense
    counted = count(model, x)
    assert counted.layers["2"] == counted.weights["2"] == 64
    assert sum(counted.weights.values()) == counted.macs == products(model)
