"""A quality budget where steps are coarse: what follows one that has to stay goes, as far as trying all says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.pruning.budgets import quality
from fastscore.pruning.budgets.finer_steps import in_place_of_last

AGREEMENT = 0.9


class Residuals(nn.Module):
    """Three large branches on a small stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def agreement(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one(x).argmax(1) == other.eval()(x).argmax(1)).double().mean())


@pytest.mark.parametrize(("seed", "whole"), [(0, False), (4, True)])
def test_what_follows_a_large_step_goes_in_its_place(seed: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = Residuals().eval(), torch.randn(600, 6)
    scores = fastscore.score(model, list(x[:128].split(64)), units="blocks", progress=False)
    seen: dict[str, Any] = {}
    own, finer_than_next = quality.select_by_quality, quality.finer_than_next

    def watched(macs: Any, build: Any, *rest: Any, finer: Any) -> Any:
        seen.update(macs=macs, build=build, finer=finer)
        return own(macs, build, *rest, tolerance=0.0, finer=finer)

    def noted(order: Any, best: int, macs: Any, along: Any) -> Any:
        seen["order"], seen["best"] = order, best
        return finer_than_next(order, best, macs, along)

    monkeypatch.setattr("fastscore.pruning.prune.select_by_quality", watched)
    monkeypatch.setattr("fastscore.pruning.prune.finer_than_next", noted)
    result = fastscore.prune(model, scores, x[:1], agreement=AGREEMENT, calibration=list(x[128:256].split(64)),
                             held_out=list(x[256:].split(172)), repair="mean", progress=False)
    order, best, macs = seen["order"], seen["best"], seen["macs"]
    assert [agreement(model, seen["build"](steps).model, x[256:]) >= AGREEMENT for steps in (best, best + 1)] == \
        [True, False]
    left = result.report.macs[1]
    other = seen["finer"](best)
    assert other is not None
    assert order[best].whole == whole
    finer, build = other
    assert [finer[steps] for steps in range(best + 1)] == [macs[steps] for steps in range(best + 1)]
    assert len(finer) <= len(in_place_of_last(order, best + 1)) + 1
    assert all(finer[steps] > macs[best + 1] for steps in range(len(finer)))
    tried = {finer[steps]: agreement(model, build(steps).model, x[256:]) >= AGREEMENT
             for steps in range(best, len(finer))}
    assert tried[left]
    assert left < macs[best]
    after = [macs for macs in tried if macs < left]
    assert not after or not tried[max(after)]  # the next one fails
    assert not whole or order[best].group not in result.removed
    chosen = [row for row in result.report.judged if row.chosen]
    assert len(chosen) == 1
    assert chosen[0].macs == pytest.approx(left / macs[0])
    assert [row.macs for row in result.report.judged] == sorted((row.macs for row in result.report.judged),
                                                                reverse=True)
