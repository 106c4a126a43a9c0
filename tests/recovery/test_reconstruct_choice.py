"""Of the repairs, the one judged nearest on samples held out is returned; and what that judgement rests on."""

import copy
from typing import Any

import pytest
import torch
from oracles import untouched
from repairing import scored
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.recovery.divergence import divergence
from fastscore.recovery.recalibration import recalibrate_on
from fastscore.recovery.reconstruct import Method, _Bench


def kl(dense: nn.Module, smaller: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return divergence(map(dense, batches), map(smaller, batches)).kl


def where_means_mislead() -> tuple[nn.Module, Tensor, fastscore.Scores]:
    """One sample that fits is far off in the channel that goes, which no other tells of: its mean misleads."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(96, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([0.1, *[1.0] * 7])))
    x[0] = torch.tensor([1e4, *[0.0] * 7])
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    return model, x, scores


def test_nothing_is_repaired_where_that_is_nearest() -> None:
    model, x, scores = where_means_mislead()
    report = fastscore.prune(model, scores, x, channels=0.9, calibration=[x], progress=False).report
    assert [row.name for row in report.repairs if row.chosen] == ["none"]


class _Doubled(nn.Module):
    """One layer runs with other weights than it holds, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.func.functional_call(self.two, {"weight": self.two.weight * 2}, (self.one(x).relu(),))
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["auto", "asymmetric"])
def test_layers_that_run_with_other_weights_for_a_while_are_not_refitted(method: Method) -> None:
    """No repair is far from what it was judged to be, and the cut of a network with those weights for good is as far
    from the dense one."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = _Doubled().double().eval()
        batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64) for _ in range(8)]
        scores = fastscore.score(model, batches[:1], progress=False)
        with untouched(model):
            result = fastscore.prune(model, scores, batches[0], macs=0.7, calibration=batches, repair=method,
                                     progress=False)
        rows = {row.name: row.kl for row in reversed(result.report.repairs)}
        assert max(rows.values()) < 10 * rows["none"]
        assert kl(model, result.model, batches) < 2 * min(rows["none"], max(row.kl for row in result.report.repairs
                                                                            if row.chosen))


@pytest.mark.parametrize("method", ["auto", "mean", "linear", "asymmetric"])
def test_what_is_returned_is_what_was_judged(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last fit that goes astray, as in a model that keeps something from call to call, is not returned."""
    model, batches, scores = scored("plain")
    cut = fastscore.prune(model, scores, batches[0][:1], channels=0.6)
    good = fastscore.reconstruct(model, cut, batches, method=method, progress=False)
    assert "last fit" not in good.report.notes
    fitted = _Bench._fitted

    def astray(self: Any, *args: Any) -> Any:
        result = fitted(self, *args)
        with torch.no_grad():
            for parameter in result.model.parameters():
                parameter.mul_(10)
        return result

    monkeypatch.setattr(_Bench, "_fitted", astray)
    found = fastscore.reconstruct(model, cut, batches, method=method, progress=False)
    assert found.report.repairs == good.report.repairs
    (chosen,) = (row for row in found.report.repairs if row.chosen)
    if chosen.name != "none":
        held_out = [x[torch.arange(8 * i, 8 * i + len(x)) % 4 == 1] for i, x in enumerate(batches)]
        assert kl(model, found.model, held_out) == pytest.approx(chosen.kl, rel=1e-6)
        assert f"against {chosen.kl:.3g}: what is returned was fitted without them" in found.report.notes["last fit"]


def test_a_repair_that_was_asked_for_and_harms_is_said() -> None:
    model, x, scores = where_means_mislead()
    with pytest.warns(UserWarning, match=r'repair: "mean" leaves a network further .* than the cut alone, KL .*"auto"'):
        fastscore.prune(model, scores, x, channels=0.9, calibration=[x], repair="mean", progress=False)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_of_which_one_sample_is_left_are_no_matter_to_batchnorms(size: int) -> None:
    """At one position, such a one has one value of each channel; the last of 5 has one from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = list(torch.randn(16, 6).split(size))
    scores = fastscore.score(model, batches, progress=False)
    with untouched(model):
        result = fastscore.prune(model, scores, batches[0], channels=0.7, calibration=batches, progress=False)
    assert any(row.recalibrated for row in result.report.repairs) == (size > 1)
    assert torch.isfinite(result.model.eval()(batches[0])).all()


def test_batches_without_variance_do_not_count_in_a_recalibration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0), nn.Unflatten(0, (-1, 3)), nn.BatchNorm1d(3)).double()
    x = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 1, 5)]
    expected = fastscore.recalibrate(copy.deepcopy(model), [x[0], x[2]]).state_dict()
    recalibrate_on(model, iter(x), call_model, None, leave_out_single=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
