"""Runs that a trace makes where they are needed, and leaves out where another has shown the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastscore.graph import tracing
from fastscore.graph.following import dependencies
from fastscore.graph.tracing import trace
from fastscore.graph.trials import surgery_trial
from fastscore.graph.trials.recording import Recording
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.macs import counting


class Idle(nn.Module):
    """Holds a layer that never runs. more(y, self): what its code does in training."""

    def __init__(self, more: Callable[[Tensor, Any], Any] = lambda y, model: y) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.idle, self.more = nn.Linear(6, 2), more

    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x).relu()).relu()
        more = self.more(y, self) if self.training else y
        return (self.last(y), more) if more is not y else self.last(y)


@pytest.mark.parametrize(("more", "times"), [
    (lambda y, model: y, 1), (lambda y, model: model.idle(y), 2), (lambda y, model: y.cumsum(-1), 2),
    (lambda y, model: model.last(y.flip(-1)), 2)])
def test_a_model_that_trains_as_it_runs_is_traced_once(more: Callable[..., Any], times: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    traced, one = [], tracing._traced
    monkeypatch.setattr(tracing, "_traced", lambda *args: traced.append(args) or one(*args))
    torch.manual_seed(0)
    found = trace(Idle(more).eval(), torch.randn(3, 4))
    assert len(traced) == times
    assert "idle" in found.training_only
    assert "first" in {group.name for group in found.groups}


class Writes(nn.Module):
    """To what a layer made of rows in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y /= 2
        return self.last(y)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Two(Own):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Chain(nn.Module):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Linear(4, 6), kind(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(self.first(x).relu())
        return self.last(y[0] if isinstance(y, tuple) else y)


class Several(nn.Conv1d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Conv1d(3, 6, 1), Several(6, 5, 1), nn.Conv1d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(self.first(x).relu())[0])


@pytest.mark.parametrize(("build", "times", "names"), [
    (Writes, 1, {"first"}), (lambda: Chain(Own), 1, {"first", "own"}), (lambda: Chain(Two), 1, {"first", "own.weight"}),
    (Convolved, 2, set())])
def test_a_graph_is_built_again_where_layers_were_not_what_they_seemed(
        build: Callable[[], nn.Module], times: int, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built, one = [], dependencies.Graph.build
    monkeypatch.setattr(dependencies.Graph, "build", lambda *args, **kwargs: built.append(args) or one(*args, **kwargs))
    torch.manual_seed(0)
    found = trace(build().eval(), torch.randn(2, 3, 4))
    assert len(built) == times
    assert {group.name for group in found.groups} == names


def test_the_code_of_a_class_is_probed_once_for_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    run, one = [], Own.forward
    monkeypatch.setattr(Own, "forward", lambda layer, x: run.append(x) or one(layer, x))
    model = nn.Sequential(*(Own(4, 4) for _ in range(5)), Own(4, 3))
    for _ in range(2):
        evaluation_copy(model)
    assert len(run) == 2


def test_groups_that_others_read_are_tried_by_themselves_where_not_all_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)).eval()
    groups = trace(model, torch.randn(3, 4)).groups
    assert len(groups) == 3
    tried, one = list[list[str]](), surgery_trial._try_without

    def failing(recording: Recording, groups: Any, removed: Any) -> Any:
        tried.append([group.name for group in groups])
        return "1" in tried[-1] or one(recording, groups, removed)

    recording = Recording(model, lambda model: model(torch.ones(3, 4)))
    with recording.record():
        model(torch.ones(3, 4))
    assert surgery_trial.go_one_by_one(recording, groups) == {"0", "1", "2"}
    monkeypatch.setattr(surgery_trial, "_try_without", failing)
    assert surgery_trial.go_one_by_one(recording, [groups[0], groups[2]]) == {"0", "2"}
    assert surgery_trial.go_one_by_one(recording, groups) == {"0", "2"}
    assert tried == [["0", "2"]] * 2 + [["0", "1", "2"]] + [["0"]] * 2 + [["1"]] + [["2"]] * 2


@pytest.mark.parametrize(("samples", "times"), [(1, 0), (2, 0), (3, 1)])
def test_products_are_counted_in_a_run_that_is_made_anyhow(samples: int, times: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    counted, one = [], counting.count
    monkeypatch.setattr(counting, "count", lambda *args: counted.append(args) or one(*args))
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    assert trace(model, torch.randn(samples, 3, 4)).macs == {"0": 60, "2": 30}
    assert len(counted) == times
