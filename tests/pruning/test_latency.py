"""A budget in measured time, by clocks that are made up, and once by a real one (whose figures are not judged)."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from benchmarks.passes import latency as benchmark
from fastscore.graph.blocks import with_blocks
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets import latency
from fastscore.pruning.budgets.costs import Costs, total_macs
from fastscore.pruning.budgets.latency import TOLERANCE, foreseen_times, say_slower
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.report import Candidate, Timing


class Branches(nn.Module):
    """Two branches that are added to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.one, self.two = (nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for width in (4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.one(x)
        return self.head(x + self.two(x))


def test_times_are_foreseen_by_widths() -> None:
    """Against the layers of each smaller network, whose MACs over the dense layer's are what remains of its time."""
    network = NETWORKS["mobile"]
    model, x = network.traced().eval(), network.inputs(2)
    graph = trace(model, x)
    costs = Costs(model, graph.groups, x)
    order = [step for group in graph.groups for step in (RemovalStep(group.name, (channel,), 0.0) for channel in (1, 0))
             if group.channels > 2 and int(group.unit.max()) + 1 == group.channels]
    seconds = {name: 1.0 + number for number, name in enumerate(costs.layers)}
    foreseen = foreseen_times(order, costs, seconds)
    assert costs.totals == costs.dense
    gone: dict[str, list[int]] = {}
    assert foreseen[0] == pytest.approx(sum(seconds.values()))
    assert len(order) > 4
    for step, found in zip(order, foreseen[1:], strict=True):
        gone.setdefault(step.group, []).extend(step.channels)
        shares = {name: Fraction(1) for name in seconds}
        for group in graph.groups:
            for member in group.members:
                left = sum(int(channel) not in gone.get(group.name, []) for channel in member.channel)
                layer = model.get_submodule(member.layer)
                depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
                if member.role == "consumer" and depthwise:
                    continue
                shares[member.layer] *= Fraction(left, len(member.channel))
        assert found == pytest.approx(sum(seconds[name] * float(share) for name, share in shares.items())), step


def in_macs(monkeypatch: pytest.MonkeyPatch, factor: Callable[[], float] = lambda: 1.0) -> None:
    """Time is MACs from now on, for all who ask."""
    def clock(one: Any, two: Any, device: torch.device, patience: int = 1) -> Timing:
        (dense, x), (other, _) = one.args, two.args
        assert not dense.training
        assert not other.training
        return Timing((1e-3, 1e-3 * total_macs(other, x) / total_macs(dense, x) * factor()), 0.0)

    monkeypatch.setattr(latency, "time_pair", clock)


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"compensate": True}, {"round_to": 2},
                                     {"cost_aware": True}, {"inplace": True}])
def test_pruned_to_a_share_of_the_time(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    in_macs(monkeypatch)
    network = NETWORKS["residual"]
    model, x = network.traced().train(), network.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    given = copy.deepcopy(model)
    result = fastscore.prune(model, scores, x, latency=0.6, **options)  # type: ignore[arg-type]
    if not options.get("inplace"):
        assert list(map(id, model.parameters())) == [id(p) for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), given.parameters(), strict=True))
    assert result.model.training
    (chosen,) = (tried for tried in result.report.candidates if tried.chosen)
    assert chosen.timing.share <= 0.6
    assert chosen.timing.share == pytest.approx(result.report.macs[1] / result.report.macs[0])
    assert chosen.macs == pytest.approx(chosen.timing.share, abs=1e-6)
    assert chosen.channels == pytest.approx(result.report.channels[1] / result.report.channels[0])
    assert chosen.params == pytest.approx(result.report.params[1] / result.report.params[0])
    curve = [(tried.channels, tried.macs, tried.timing.share) for tried in result.report.candidates]
    assert curve == sorted(curve, reverse=True)
    assert f"chosen: {chosen.timing.share:.1%} (± 0.0%) of the time, 1 →" in str(result.report)
    # not below what the same order gives by MACs, but for the tolerance or one step
    by_macs = fastscore.prune(given, scores, x, macs=0.6, **{**options, "inplace": False})  # type: ignore[arg-type]
    assert result.report.channels[1] >= by_macs.report.channels[1] - 4


def test_other_budgets_hold_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    in_macs(monkeypatch)
    model, x = NETWORKS["mobile"].traced(), NETWORKS["mobile"].inputs(2)
    scores = fastscore.score(model, [x], progress=False)
    tight = fastscore.prune(model, scores, x, latency=0.9, params=0.5)
    assert tight.report.params[1] / tight.report.params[0] <= 0.5
    loose = fastscore.prune(model, scores, x, latency=0.5, params=0.95)
    assert loose.report.macs[1] / loose.report.macs[0] <= 0.5
    assert not fastscore.prune(model, scores, x, latency=1.0).removed
    with untouched(model), pytest.raises(ValueError, match=r"^latency: 0.01 cannot be reached: .*0\.\d+ of the dense"):
        fastscore.prune(model, scores, x, latency=0.01)
    with untouched(model), pytest.raises(ValueError, match=r"^latency: 1.5 is outside \(0, 1\]"):
        fastscore.prune(model, scores, x, latency=1.5)
    with untouched(model), pytest.raises(ValueError, match=r"^prune: name a budget: .*latency="):
        fastscore.prune(model, scores, x)


def test_by_a_noisy_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    in_macs(monkeypatch, lambda: generator.uniform(0.9, 1.1))
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(2)
    scores = fastscore.score(model, [x], progress=False)
    for percent in range(30, 100, 10):
        report = fastscore.prune(model, scores, x, latency=percent / 100).report
        (chosen,) = (tried for tried in report.candidates if tried.chosen)
        assert chosen.timing.share <= percent / 100
        assert "unsteady" not in str(report)


def test_a_clock_that_cannot_tell_is_said_to_be_unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(2)
    scores = fastscore.score(model, [x], progress=False)
    monkeypatch.setattr(latency, "time_pair", lambda *arguments: Timing((1.0, 0.5), 0.2))
    report = fastscore.prune(model, scores, x, latency=0.6).report
    assert "the clock was unsteady: measured again, the share may be another by 20% of the dense model's" in str(report)


def test_models_take_turns_and_medians_are_of_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each model moves by its own time, 5 ms and 0.5 ms, with a hiccup now and then."""
    now, ran = [0.0], []

    class Sleeper(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            ran.append(self.seconds)
            now[0] += self.seconds * (10 if len(ran) % 17 == 0 else 1)
            return x

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    timing = latency.time_pair(partial(Sleeper(5e-3), torch.ones(1)), partial(Sleeper(5e-4), torch.ones(1)),
                                torch.device("cpu"))
    assert timing.seconds == pytest.approx((5e-3, 5e-4))
    assert timing.share == pytest.approx(0.1)
    assert ran.count(5e-4) == pytest.approx(4 * ran.count(5e-3), rel=0.1)  # short calls are read 4 at a time
    turns = [seconds for seconds, before in zip(ran[20:], ran[19:], strict=False) if seconds != before]
    assert len(turns) > 9


def test_by_a_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it measures, it says; a budget that anything meets is met."""
    monkeypatch.setattr(latency, "_SECONDS", 0.3)  # long enough for a busy machine
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    x = torch.randn(2, 3, 24, 24)
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    with untouched(model):
        result = fastscore.prune(model, scores, x, latency=0.7)
    (chosen,) = (tried for tried in result.report.candidates if tried.chosen)
    assert 0 < chosen.timing.share <= 0.7
    assert 0 < chosen.timing.seconds[1] < chosen.timing.seconds[0]
    assert chosen.timing.uncertainty >= 0
    assert result.report.channels[1] < result.report.channels[0]


def test_a_noisy_machine_is_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clocks, steady and with noise of 30 %; the second is read until the median is known, or patience ends."""
    for noise, least, most in ((0.0, 0.4, 0.45), (0.3, 0.45, 2.1)):
        now, generator = [0.0], random.Random(1)

        def call(now: list[float] = now, generator: random.Random = generator, noise: float = noise) -> None:
            now[0] += 0.005 * generator.uniform(1 - noise, 1 + noise)

        monkeypatch.setattr(latency.time, "perf_counter", lambda now=now: now[0])
        timing = latency.time_pair(call, call, torch.device("cpu"))
        assert least <= now[0] - 0.03 <= most
        assert timing.uncertainty < 2 * TOLERANCE + noise / 3
        assert timing.share == pytest.approx(1, abs=noise / 3 + 1e-9)


def test_the_benchmark_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    in_macs(monkeypatch)
    monkeypatch.delitem(benchmark.RANKINGS, "round_to auto")  # narrower networks than any hardware likes
    monkeypatch.delitem(benchmark.RANKINGS, "isomorphic, auto")
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(1)
    lines = list(benchmark.rows("residual", model, x, (0.6, 0.001)))
    assert len(lines) == 2 * len(benchmark.RANKINGS)
    for reached, refused in zip(lines[::2], lines[1::2], strict=True):
        figures = [float(word.rstrip("%")) for word in reached.split()[-8:]]
        assert figures[0] == 60
        assert figures[1] == figures[3] <= 60  # time is MACs
        assert figures[5] >= 2
        assert "latency: 0.001 cannot be reached" in refused


def test_finer_steps_stand_in_for_a_branch_that_takes_far_more_than_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the branch would leave, and the widths that are left, by a clock that counts MACs."""
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 4, 5)
    in_macs(monkeypatch)
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    first = replace(scores, totals={name: total * 1e-9 if name == "one" else total for name, total in
                                    scores.totals.items()})
    dense = total_macs(model, x)
    without = total_macs(fastscore.prune(model, replace(scores, totals={"one": scores.totals["one"]}), x,
                                         params=0.99).model, x)
    share = 1 - 0.25 * (1 - without / dense)  # a quarter of what the branch takes
    result = fastscore.prune(model, first, x, latency=share, cost_aware=False)
    left = result.report.macs[1] / dense
    assert "one" not in result.removed
    assert without / dense < left <= share
    (chosen,) = (tried for tried in result.report.candidates if tried.chosen)
    assert chosen.timing.share == pytest.approx(left)


def test_a_branch_that_goes_takes_the_time_of_all_that_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the layers that are left, and a second for what the branch does beside them."""
    model, x = Branches().eval(), torch.randn(2, 4, 5)
    graph = with_blocks(trace(model, x, units="blocks"))
    costs = Costs(model, graph.groups, x)
    seconds = {name: 1.0 + number for number, name in enumerate(costs.layers)}
    order = [RemovalStep(group, (channel,), 0.0) for group, channel in (("one.0", 1), ("one", 0), ("one.0", 2),
                                                                        ("two", 0))]
    foreseen = foreseen_times(order, costs, seconds)
    whole, one, two = (math.fsum(second for name, second in seconds.items() if name.startswith(part))
                       for part in ("", "one", "two"))
    assert {"one", "one.0", "one.2", "two"} < set(seconds)
    assert foreseen == pytest.approx([whole, whole - (seconds["one.0"] + seconds["one.2"]) / 4, whole - one,
                                      whole - one, whole - one - two])
    assert costs.totals == costs.dense
    in_macs(monkeypatch)
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    for share in (0.8, 0.6, 0.4):
        report = fastscore.prune(model, scores, x, latency=share).report
        (chosen,) = (tried for tried in report.candidates if tried.chosen)
        assert chosen.timing.share <= share
        assert chosen.timing.share == pytest.approx(report.macs[1] / report.macs[0])


def test_a_note_says_where_smaller_models_were_slower() -> None:
    def tried(*shares: float) -> list[Candidate]:
        return [Candidate(0.5, 0.5, 0.5, Timing((1.0, share), 0.01, "onnxruntime"), False) for share in shares]

    assert say_slower(tried(0.7, 1.015)) == ""
    assert say_slower(tried(0.7, 1.61, 1.18)).startswith(
        "2 of 3 smaller models that were timed took longer than the dense one (up to 161% of its time): onnxruntime")
