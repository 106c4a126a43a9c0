"""prune() runs what it returns, as it is: the copy, the copy that was repaired, the model itself."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.trials import returned_trial
from fastscore.pruning.result import PruneResult

X = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CALIBRATION = [X, X + 1, X - 1, 2 * X]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False)
        self.norm, self.third = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.norm(self.second(self.act(self.first(x)))).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


class Counted(nn.Module):
    """Says how often it ran, whatever copy of it that was."""

    runs: ClassVar[list[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(self)
        return x.tanh()


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"calibration": CALIBRATION},
                                     {"calibration": CALIBRATION, "inplace": True},
                                     {"calibration": CALIBRATION, "agreement": 0.5}])
def test_what_is_returned_has_run(options: dict[str, Any]) -> None:
    """The very object, last of all."""
    model = net()
    model.act = Counted()
    scores = fastscore.score(model, [X], progress=False)
    budget = {} if "agreement" in options else {"channels": 0.5}
    result = fastscore.prune(model, scores, X, repair="mean" if "calibration" in options else "auto", **budget,
                             **options, progress=False)
    ran, last = any(module is result.model.act for module in Counted.runs), Counted.runs[-1]
    Counted.runs.clear()
    assert ran
    assert last is result.model.act or "agreement" in options  # where copies of it judge


def test_of_a_copy_that_does_not_run_the_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trial lets it pass, as on other example inputs: the group stays."""
    monkeypatch.setattr(returned_trial, "offered", lambda model, eval_model, graph, *runs: graph)

    class Remembering(nn.Tanh):
        width = 8

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 8 or len(x) != 2, "a width"
            return super().forward(x)

    model = net()
    model.act = Remembering()
    scores = fastscore.score(model, [X], progress=False)
    with untouched(model), pytest.warns(UserWarning, match=r"^first keeps 8 of its 8 channels: with fewer, the smaller "
                                        r"model does not run \(act \(Remembering\): AssertionError: a width\)"):
        small = fastscore.prune(model, scores, X[:2], channels=0.7).model
    assert small.second.out_features < 6


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_a_model_that_does_not_bear_it_in_place_is_as_it_was(calibration: list[Tensor] | None) -> None:
    """A hook knows the layer that it was set on, and does nothing of copies of it."""
    model = net()
    seen = list[int]()
    handle = model.third.register_forward_hook(
        lambda module, args, output: output + args[0].view(-1, 6)[:, :4] if module is model.third else output)
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(1))
    scores = fastscore.score(model, [X], progress=False)
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {"channels": 0.5, "calibration": calibration, "progress": False,
                               "repair": "mean" if calibration else "auto"}
    with untouched(model), pytest.raises(RuntimeError, match=r"^the model, pruned in place, does not run \(third \(Line"
                                         r"ar\): RuntimeError: .*\), and a copy of it does run: leave inplace= out"):
        fastscore.prune(model, scores, X, **options, inplace=True)
    assert before == {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    small = fastscore.prune(model, scores, X, **options).model
    assert small.first.out_features + small.second.out_features == 7
    handle.remove()
    torch.testing.assert_close(model(X), copy.deepcopy(model)(X))


def test_a_repair_after_which_nothing_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own, made, breaks_at = PruneResult.cut_again, list[nn.Module](), 0

    def watched(self: PruneResult, *args: Any) -> PruneResult:
        found = own(self, *args)
        made.append(found.model)
        if len(made) == breaks_at:
            found.model.act = nn.Linear(3, 3)
        return found

    monkeypatch.setattr(PruneResult, "cut_again", watched)
    model = net()
    scores = fastscore.score(model, [X], progress=False)
    options: dict[str, Any] = {"channels": 0.5, "calibration": CALIBRATION, "repair": "mean", "progress": False}
    fastscore.prune(model, scores, X, **options)
    breaks_at = len(made)  # the last: all before it are tried
    made.clear()
    with untouched(model), pytest.raises(RuntimeError, match=r"^the pruned model does not run \(act \(Linear\): .*"
                                         "once it is repaired, and did before: leave calibration= out"):
        fastscore.prune(model, scores, X, **options)


class Stream(nn.Module):
    """Keeps what it read: a first batch's mean, the last batches, how many they were."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)
        self.calls, self.last, self.found = 0, list[Tensor](), dict[str, Any]({"all": [1]})
        self.plain = torch.zeros(5, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("begun", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.begun == 0:
            self.mean.copy_(x.mean(0))
            self.begun.fill_(1)
            self.plain += 1
        self.calls += 1
        self.last.append(x)
        self.found["all"].append(2)
        self.seen = x
        self.register_buffer("kept", x)
        return self.second(self.first(x - self.mean).relu())


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"calibration": CALIBRATION}])
def test_what_is_returned_starts_where_the_dense_one_did(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Stream().double().eval()
    small = fastscore.prune(model, fastscore.score(model, CALIBRATION), X[:2], channels=0.5, **options).model
    assert small.first.out_features < 8
    for each in (model, small):
        assert (int(each.begun), each.calls, each.last, each.found) == (0, 0, [], {"all": [1]})
        assert not torch.cat([each.mean, each.plain]).any()
        assert not {"seen", "kept"} & {*vars(each), *each._buffers}
