"""How many samples the dense network and smaller ones run: what follows from the dense network alone runs once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.recovery.remembering_batches import RememberingBatches

SAMPLES = 96
FIT, JUDGE = SAMPLES * 3 // 4, SAMPLES // 4
ran: Counter[str] = Counter()


class Counted(nn.Module):
    """Counts the samples that it sees, but for those of tracing: not more than two at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 5)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            whole = (self.a.out_channels, self.b.out_channels) == (12, 16)
            ran["dense" if whole else "smaller"] += len(x)
        y: Tensor = self.c(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))
        return y


def case() -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    torch.manual_seed(0)
    model, batches = Counted().eval(), list(torch.randn(SAMPLES, 1, 6, 6).split(16))
    return model, batches, fastscore.score(model, batches, ablation="mean", progress=False)


def counted(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    ran.clear()
    made = call()
    return made, Counter(ran)


def test_a_repair_runs_the_dense_network_as_often_as_it_must() -> None:
    model, batches, scores = case()
    given: Any = {"calibration": batches, "progress": False}
    _, found = counted(lambda: fastscore.prune(model, scores, batches[0][:2], macs=0.6, repair="linear", **given))
    assert found == {"dense": FIT + JUDGE, "smaller": 5 * JUDGE}  # moments, outputs; the cut, three ridges, the last
    _, found = counted(lambda: fastscore.prune(model, scores, batches[0][:2], macs=0.6, repair="auto", measured=True,
                                               **given))
    fits = FIT + JUDGE + FIT + FIT + JUDGE  # asymmetric: with the ridge of each layer, stiffer, and on all
    measured = JUDGE // 2 + JUDGE // 2  # which judge groups, and which judge the choice, where there is one
    assert found["dense"] <= FIT + JUDGE + measured + fits


@pytest.mark.parametrize("repair", ["linear", "auto"])
def test_a_search_runs_it_no_more_often_than_one_cut_does(repair: str) -> None:
    """Each of a dozen networks measured the same moments anew."""
    model, batches, scores = case()
    given: Any = {"calibration": batches, "held_out": [torch.randn(40, 1, 6, 6)], "repair": repair, "progress": False}
    result, found = counted(lambda: fastscore.prune(model, scores, batches[0][:2], agreement=0.7, **given))
    networks = len(result.report.judged)
    assert networks > 2
    fits = 0 if repair == "linear" else networks * (2 * FIT + 2 * SAMPLES)
    assert found["dense"] <= 40 + FIT + JUDGE + fits + (0 if repair == "linear" else JUDGE)


def test_a_curve_is_that_of_cuts_made_one_by_one() -> None:
    """Groups are measured once for all budgets, and give the very networks that each budget alone gives."""
    model, batches, scores = case()
    budgets, judges = (0.8, 0.6, 0.4), [torch.randn(40, 1, 6, 6)]
    given: Any = {"repair": "auto", "progress": False}

    def one_by_one() -> list[fastscore.PruneResult]:
        return [fastscore.prune(model, scores, batches[0][:2], macs=budget, calibration=batches, **given)
                for budget in budgets]

    alone, apart = counted(one_by_one)
    seen = RememberingBatches.of(batches)
    shared, together = counted(lambda: [fastscore.prune(model, scores, batches[0][:2], macs=budget, calibration=seen,
                                                        **given) for budget in budgets])
    for one, other in zip(alone, shared, strict=True):
        assert one.report == other.report
        assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    assert together["dense"] <= apart["dense"] - 2 * (FIT + JUDGE)
    found, drawn = counted(lambda: fastscore.curve(model, scores, batches, budgets, held_out=judges, example_inputs=
                                                   batches[0][:2], **given))
    assert [row.repair for row in found.rows]
    assert drawn["dense"] == together["dense"] + 40
