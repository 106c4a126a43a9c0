"""Long work says so on stderr, short work nothing; `progress=False` silences all of it."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import nn

import fastscore
from fastscore import progress
from fastscore.pruning import latency
from fastscore.pruning.costs import total_macs
from fastscore.pruning.report import Timing


def small() -> tuple[nn.Module, torch.Tensor]:
    return NETWORKS["residual"].model().eval(), NETWORKS["residual"].inputs(8)


def by_macs(one: Any, two: Any, device: torch.device, patience: int = 1) -> Timing:
    return Timing((1.0, total_macs(*two.args) / total_macs(*one.args)), 0.0)


WORK: dict[str, Callable[[nn.Module, torch.Tensor, Any, bool], object]] = {
    "tracing": lambda model, x, scores, told: fastscore.score(copy.deepcopy(model), [x], progress=told),
    "timing": lambda model, x, scores, told: fastscore.prune(model, scores, x, latency=0.6, progress=told),
    "repairing": lambda model, x, scores, told: fastscore.prune(
        model, scores, x, macs=0.6, calibration=[x], repair="mean", progress=told),
    "judging": lambda model, x, scores, told: fastscore.prune(
        model, scores, x, agreement=0.9, calibration=[x], repair="mean", progress=told),
    "distilling": lambda model, x, scores, told: fastscore.distill(
        model, fastscore.prune(model, scores, x, macs=0.6, progress=told), [x] * 2, steps=2, progress=told),
}


@pytest.mark.parametrize("what", WORK)
def test_long_work_is_told(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(latency, "time_pair", by_macs)
    model, x = small()
    scores = fastscore.score(model, [x], progress=False)
    capsys.readouterr()
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    WORK[what](model, x, scores, True)
    assert what in capsys.readouterr().err
    WORK[what](model, x, scores, False)
    assert capsys.readouterr().err == ""


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS", 3600.0)
    for _ in range(2):
        with progress.working("thinking"), progress.bar("counting", " sheep") as bar:
            bar.update()
    assert capsys.readouterr().err == ""


def test_a_block_that_is_silent_stays_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for outer, inner in itertools.product((True, False), repeat=2):
        with progress.shown(outer), progress.shown(inner), progress.bar("counting", " sheep") as bar:
            bar.update()
        assert ("counting" in capsys.readouterr().err) is (outer and inner)
