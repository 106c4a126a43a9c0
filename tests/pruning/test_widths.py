"""Code that does not run at some widths, which no trial before scoring met: they are left out, and said; what is pruned
runs, and computes what the masked model does."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.groups import ChannelGroup
from fastscore.pruning.budgets import latency
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.order.widths import Widths
from fastscore.pruning.report import Timing

Look = Callable[[Tensor, Tensor, Tensor], Tensor]
X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = list(X.split(8))


class Net(nn.Module):
    """look(first, second, output) -> what it returns: by how many channels the two have, or raises."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.third, self.last = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 2, 1)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        second = F.relu(self.second(first))
        return self.look(first, second, self.last(F.relu(self.third(second))).mean((2, 3)))


def refusing(runs: Callable[[int, int], bool]) -> Look:
    def look(first: Tensor, second: Tensor, output: Tensor) -> Tensor:
        if not runs(first.shape[1], second.shape[1]):
            raise ValueError(f"{first.shape[1]} and {second.shape[1]}")
        return output

    return look


KINDS: dict[str, tuple[Look, Callable[[int, int], bool]]] = {  # what it does, and at which widths that is right
    name: (refusing(runs), runs) for name, runs in {
        "one": lambda one, two: one >= 6,
        "two": lambda one, two: one >= 6 and two >= 7,
        "together": lambda one, two: one + two >= 16,
        "beside": lambda one, two: one + 3 >= two,
        "between": lambda one, two: one not in (3, 4, 5),
    }.items()}
KINDS["another shape"] = lambda one, two, y: y if one.shape[1] >= 6 else y[:, :1], KINDS["one"][1]
BUDGETS: list[dict[str, Any]] = [
    {"channels": 0.5, "scope": "layer"}, {"macs": 0.25}, {"params": 0.3}, {"channels": 0.45, "cost_aware": False,
    "round_to": 2}, {"channels": 0.45, "inplace": True}]
REPAIRED: list[dict[str, Any]] = [{"channels": 0.42, "calibration": BATCHES},
                                  {"agreement": 0.5, "calibration": BATCHES}]


def widths(model: Any) -> tuple[int, int]:
    return model.first.out_channels, model.second.out_channels


def unequal(look: Look) -> tuple[nn.Module, fastscore.Scores]:
    """Of which the first two layers go before the third."""
    model = noisy(lambda: Net(look))
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[3:] *= 0.1
    return model, fastscore.score(model, BATCHES, progress=False)


@pytest.mark.filterwarnings("ignore:(first|second) keeps")
@pytest.mark.parametrize("kind", KINDS)
def test_budgets_are_met_by_widths_at_which_the_model_runs(kind: str) -> None:
    look, runs = KINDS[kind]
    backed_off = 0
    for budget in (*BUDGETS, *(REPAIRED if kind in ("one", "another shape") else ())):
        model, scores = unequal(look)
        options = budget if "calibration" in budget else {"compensate": False, **budget}
        result = fastscore.prune(model, scores, BATCHES[0], progress=False, **options)
        assert runs(*widths(result.model)), budget
        backed_off += "widths" in result.report.notes
        if name := next((name for name in ("channels", "macs", "params") if name in budget), ""):
            before, after = getattr(result.report, name)
            assert after <= budget[name] * before
        if "calibration" not in budget and "inplace" not in budget:
            with torch.no_grad(), fastscore.mask(model, scores, result, X, compensate=False):
                want = model(X)
            torch.testing.assert_close(result.model.eval()(X), want, rtol=1e-9, atol=1e-9)
    assert backed_off


def test_the_smallest_width_that_runs_is_kept_and_said() -> None:
    model, scores = unequal(KINDS["one"][0])
    said = "first keeps 6 of its 16 channels: with fewer, the smaller model does not run (Net: ValueError: "
    with untouched(model), pytest.warns(UserWarning, match=re.escape(said)):
        result = fastscore.prune(model, scores, BATCHES[0], channels=0.3)
    assert result.model.first.out_channels == 6
    assert result.report.notes["widths"].startswith(said)
    assert "first keeps 6 of its 16" in str(result.report)
    with untouched(model), pytest.raises(ValueError, match=r"0\.1 cannot be reached.*, 0\.1819 of the channels remain; "
                                         r"ask for more, .*\. first keeps 6 of its 16 channels: with fewer"):
        fastscore.prune(model, scores, BATCHES[0], channels=0.1)
    with pytest.warns(UserWarning, match="first keeps 6"):
        assert widths(fastscore.prune(model, scores, BATCHES[0], channels=0.1819).model) == (6, 1)


def test_a_width_between_others_is_stepped_over() -> None:
    model, scores = unequal(KINDS["between"][0])
    with pytest.warns(UserWarning, match="first keeps no 3 to 5 of its 16 channels: with so many"):
        result = fastscore.prune(model, scores, BATCHES[0], channels=0.25, scope="layer")
    assert result.model.first.out_channels == 2


@pytest.mark.filterwarnings("ignore:(first|second) keeps")
@pytest.mark.parametrize("budget", [{"channels": 0.25}, {"channels": 0.4, "inplace": True}, {"params": 0.35},
                                    {"macs": 0.3}, {"channels": 0.4, "round_to": 3}])
def test_widths_that_depend_on_each_other(budget: dict[str, Any]) -> None:
    """No width of one of them is left out whatever the other has: both go, in steps with which the model runs."""
    model, scores = unequal(refusing(lambda one, two: (one + two) % 2 == 0))
    result = fastscore.prune(copy.deepcopy(model), scores, BATCHES[0], compensate=False, **budget)
    assert sum(widths(result.model)) % 2 == 0
    name = next(iter(budget))
    before, after = getattr(result.report, name)
    assert after <= budget[name] * before
    with torch.no_grad(), fastscore.mask(model, scores, result, X, compensate=False):
        torch.testing.assert_close(result.model.eval()(X), model(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("look", "beside"), [
    (refusing(lambda one, two: one >= 6), False), (refusing(lambda one, two: one + two >= 16), True)])
def test_a_width_that_depends_on_what_others_keep_is_said_to(look: Look, beside: bool) -> None:
    model, scores = unequal(look)
    with pytest.warns(UserWarning, match="keeps"):
        result = fastscore.prune(model, scores, BATCHES[0], channels=0.45)
    said = result.report.notes["widths"]
    assert ("with fewer beside what other groups keep, the smaller model" in said) == beside, said
    assert ("with fewer, the smaller model" in said) != beside, said


def test_in_steps_that_are_scored_anew() -> None:
    """Where the next step finds that half of what is left cannot go, it says so where its budget cannot be met."""
    model = unequal(KINDS["one"][0])[0]
    with pytest.warns(UserWarning, match="first keeps 6 of its 16"):
        result = fastscore.prune_iteratively(model, BATCHES, steps=2, channels=0.2, progress=False)
    assert result.model.first.out_channels == 6
    assert sum(row.channels[1] for row in result.report.groups) <= 0.2 * 44
    with pytest.raises(ValueError, match=r"^step 2 of 2 .* cannot be reached.* first can lose no more: the model does "
                                         r"not run with fewer channels there \(Net: ValueError"), \
            pytest.warns(UserWarning, match="first keeps 6 of its 16"):
        fastscore.prune_iteratively(model, BATCHES, steps=2, channels=0.14, progress=False)


def test_where_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(call: Any) -> float:
        return float(sum(parameter.numel() for parameter in call.args[0].parameters()))

    monkeypatch.setattr(latency, "time_pair", lambda dense, other, *rest: Timing((size(dense), size(other)), 0.0))
    model, scores = unequal(KINDS["one"][0])
    with pytest.warns(UserWarning, match="first keeps 6"):
        result = fastscore.prune(model, scores, BATCHES[0], latency=0.13, cost_aware=False)
    assert result.model.first.out_channels == 6


def test_what_is_said_of_a_width_does_not_contradict_itself() -> None:
    """Where a group is found to have more than one least width, it has the largest."""
    found = Widths([ChannelGroup("one", 16, torch.arange(16), ())])
    found._between["one"] = [
        (8, None, "fails", True), (6, None, "fails", True), (2, 4, "fails", True), (7, 9, "fails", True),
        (2, 4, "fails", True)]
    assert str(found) == "one keeps 10 of its 16 channels: with fewer, the smaller model fails; " \
                         "one keeps no 13 of its 16 channels: with so many, the smaller model fails"


def test_steps_wait_for_those_of_groups_that_go_with_them() -> None:
    found = Widths(())
    found._between["one"] = [(1, 3, "", True)]
    steps = [RemovalStep("one", (0,), 0.0), RemovalStep("one", (1,), 1.0, (("two", (5,)),)),
             RemovalStep("two", (6,), 2.0), RemovalStep("one", (2,), 3.0)]
    first, *rest = found.along(steps)
    assert first is steps[0]
    assert [(step.value, dict(step.parts)) for step in rest] == [(3.0, {"one": (1, 2), "two": (5, 6)})]
    assert found.along(steps[:3]) == steps[:1]
