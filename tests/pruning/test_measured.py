"""Groups compared by what the loss of their channels costs once it is repaired."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.pruning.order import measured
from fastscore.pruning.order.measured import LIMITS, SHARES, Measured, _line, measurable, reordered
from fastscore.pruning.order.ranking import RemovalStep, removal_order
from fastscore.recovery.divergence import divergence
from fastscore.recovery.remembering_batches import RememberingBatches


class TwoGroups(nn.Module):
    """The second half of the first layer's channels are linear functions of the first; the other layer's are not."""

    def __init__(self) -> None:
        super().__init__()
        self.copied, self.plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            mix = torch.randn(4, 4)
            self.copied.weight[4:] = torch.einsum("ab,b...->a...", mix, self.copied.weight[:4])
            self.copied.bias[4:] = mix @ self.copied.bias[:4]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.plain(self.copied(x)).relu().mean((2, 3)))
        return y


def case() -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    torch.manual_seed(0)
    model, batches = TwoGroups().eval(), [torch.randn(16, 3, 8, 8) for _ in range(4)]
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    totals = dict(scores.totals)
    totals["copied"] = totals["copied"].clone()
    totals["copied"][..., 4:] *= 1e-3  # they go first
    return model, batches, replace(scores, totals=totals)


def test_what_others_tell_costs_nothing_and_the_rest_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, scores = case()
    graph, eval_model = trace(model, batches[0]), evaluation_copy(model)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(measured, "reordered", lambda order, groups, values, curves, costs: seen.update(
        values=values, curves=curves) or list(order))
    with untouched(model):
        Measured(model, eval_model, graph, scores, lambda values: removal_order(graph.groups, values), None,
                 RememberingBatches.of(batches), call_model, None, None)
    values, curves = seen["values"], seen["curves"]
    assert curves.keys() == values.keys() == {"copied", "plain"}

    gone = sorted(values["plain"].argsort()[:2].tolist())  # a quarter, cut and repaired as a user would
    lowest = torch.ones_like(scores.totals["plain"])
    lowest[..., gone] = 0
    some = replace(scores, totals={"plain": lowest})
    cut = fastscore.prune(model, some, batches[0], channels=0.75, ignore=["copied"])
    assert cut.removed["plain"].tolist() == gone
    repaired = fastscore.reconstruct(model, cut, batches, "linear", ridges=(0.01,)).model
    with torch.no_grad():
        kl = divergence(map(model, batches), map(repaired, batches)).kl
    a, b = curves["plain"]
    found = math.exp(a + b / 4) * float(values["plain"][gone].sum())
    assert found == pytest.approx(kl, rel=1.0)  # other samples, and a line through three shares


def test_a_repaired_budget_goes_where_it_costs_least() -> None:
    model, batches, scores = case()
    flat = {name: torch.ones_like(total) for name, total in scores.totals.items()}
    flat["plain"] *= 0.99
    scores = replace(scores, totals=flat)
    found = {measured: fastscore.prune(model, scores, batches[0], channels=0.75, calibration=batches,
                                       measured=measured).removed for measured in (None, False)}
    assert len(found[None]["copied"]) >= 3
    assert len(found[False]["plain"]) == 4
    plain = fastscore.prune(model, scores, batches[0], channels=0.75).removed
    assert found[False].keys() == plain.keys()
    assert all(torch.equal(found[False][name], plain[name]) for name in plain)


def test_steps_are_ordered_by_what_the_cost_grows_by() -> None:
    model, batches, scores = case()
    groups = trace(model, batches[0]).groups
    order = removal_order(groups, scores)
    curves = {"copied": (math.log(0.5), 0.0), "plain": (math.log(0.1), 2.0)}
    costs = {"copied": torch.full((8,), 2.0), "plain": torch.full((8,), 4.0)}
    found = reordered(order, groups, scores, curves, costs)
    assert sorted(step.value for step in found) == [step.value for step in found]
    for name in curves:
        assert [step.channels for step in found if step.group == name] == \
            [step.channels for step in order if step.group == name]
    values = [step.value for step in found if step.group == "copied"]
    expected = [0.25 * float(scores["copied"][list(step.channels)].sum()) for step in order if step.group == "copied"]
    assert values == pytest.approx(expected)
    first = next(step for step in found if step.group == "plain")
    assert first.value == pytest.approx(0.1 * math.exp(2 / 8) * float(scores["plain"][list(first.channels)].sum()) / 4)
    assert reordered(order, groups, scores, {}, costs) == order


def test_a_group_of_which_nothing_was_measured_has_the_mean_of_the_others() -> None:
    model, batches, scores = case()
    groups = trace(model, batches[0]).groups
    order = [RemovalStep("plain", (channel,), 0.0) for channel in range(4)]
    known = reordered(order, groups, scores, {"plain": (0.5, 1.0)}, None)
    assert known == reordered(order, groups, scores, {"copied": (0.5, 1.0)}, None)


def test_a_line_in_the_logarithm_that_does_not_fall() -> None:
    a, b = _line([(share, math.exp(-2 + 1.5 * share)) for share in SHARES])
    assert (a, b) == pytest.approx((-2, 1.5))
    a, b = _line([(share, math.exp(-2 - share)) for share in SHARES])
    assert b == 0
    assert a == pytest.approx(-2 - sum(SHARES) / len(SHARES))
    assert _line([(0.5, math.inf)]) == pytest.approx((math.log(LIMITS[1]), 0))
    assert _line([(0.5, 0.0)]) == pytest.approx((math.log(LIMITS[0]), 0))


def test_what_cannot_be_measured_is_said() -> None:
    model, batches, scores = case()
    x = batches[0]
    weights = fastscore.score(model, batches, importance="magnitude-l2", progress=False)
    assert [measurable(each) for each in (scores, weights)] == [True, False]
    for given, options in ((scores, {}), (weights, {"calibration": batches}),
                           (scores, {"calibration": batches, "scope": "layer"})):
        with untouched(model), pytest.raises(ValueError, match="measured: it takes calibration"):
            fastscore.prune(model, given, x, channels=0.5, measured=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [{"channels": 0.75}, {"kl": 1e-4}])
def test_of_measured_groups_and_importances_alone_the_better_is_taken(budget: Any,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, scores = case()
    scores = replace(scores, totals={name: torch.full_like(total, {"copied": 1.0, "plain": 0.99}[name])
                                     for name, total in scores.totals.items()})

    def found(measured: bool | None) -> fastscore.PruneResult:
        return fastscore.prune(model, scores, batches[0], calibration=batches, repair="linear", measured=measured,
                               progress=False, **budget)

    alone, measured = found(False), found(True)
    assert alone.removed.keys() != measured.removed.keys() or any(
        not torch.equal(alone.removed[name], measured.removed[name]) for name in alone.removed)
    assert measured.report.notes["choice"].startswith("groups as measured: repaired linearly, KL ")
    assert measured.report.notes["choice"].endswith("on samples held out that have not measured groups")
    assert "choice" not in alone.report.notes
    monkeypatch.setattr(Measured, "lost", lambda self, *choices: [2.0, 1.0])
    other = found(True)
    assert other.removed.keys() == alone.removed.keys()
    assert all(torch.equal(other.removed[name], alone.removed[name]) for name in alone.removed)
    assert other.report.notes["choice"].startswith("importances alone: repaired linearly, KL 1 against 2")
    assert other.report.macs == alone.report.macs


def test_what_a_choice_loses_is_judged_on_samples_that_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, scores = case()
    graph, eval_model = trace(model, batches[0]), evaluation_copy(model)
    for forward in (call_model, lambda network, batch: network(batch)):
        found = Measured(model, eval_model, graph, scores, lambda values: removal_order(graph.groups, values), None,
                         RememberingBatches.of(batches * 2), forward, None, None)
        parts = {"measure": found._calibration.some(0, found._measuring),
                 "tell": found._calibration.some(found._measuring), "all": found._calibration.part("held out")}
        taken = {name: [sample.sum().item() for batch in part for sample in batch] for name, part in parts.items()}
        assert taken["measure"] + taken["tell"] == taken["all"]
        assert min(len(taken["measure"]), len(taken["tell"])) >= len(taken["all"]) // 2
        gone = {"plain": torch.tensor([0, 1])}
        nothing, something = found.lost({}, gone)
        assert nothing == pytest.approx(0, abs=1e-9)
        assert something > 1e-6
