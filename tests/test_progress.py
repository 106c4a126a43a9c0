"""Long work says so on stderr, short work nothing; `progress=False` silences all of it."""

import copy
import io
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import nn

import fastscore
from fastscore import progress
from fastscore.pruning.budgets import latency
from fastscore.pruning.budgets.costs import total_macs
from fastscore.pruning.report import Timing


def small() -> tuple[nn.Module, torch.Tensor]:
    return NETWORKS["residual"].model().eval(), NETWORKS["residual"].inputs(8)


def by_macs(one: Any, two: Any, device: torch.device, patience: int = 1) -> Timing:
    return Timing((1.0, total_macs(*two.args) / total_macs(*one.args)), 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


WORK: dict[str, Callable[[nn.Module, torch.Tensor, Any, bool], object]] = {
    "scoring": lambda model, x, scores, told: fastscore.score(model, x.split(4), progress=told),
    "curve": lambda model, x, scores, told: fastscore.curve(model, scores, x.split(2), (0.8,), repair="mean",
                                                            progress=told),
    "tracing": lambda model, x, scores, told: fastscore.score(copy.deepcopy(model), [x], progress=told),
    "timing": lambda model, x, scores, told: fastscore.prune(model, scores, x, latency=0.6, progress=told),
    "repairing": lambda model, x, scores, told: fastscore.prune(
        model, scores, x, macs=0.6, calibration=[x], repair="mean", progress=told),
    "ordering channels": lambda model, x, scores, told: fastscore.prune(
        model, scores, x, macs=0.6, calibration=[x], repair="asymmetric", progress=told),
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
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
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
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    for outer, inner in itertools.product((True, False), repeat=2):
        with progress.shown(outer), progress.shown(inner), progress.bar("counting", " sheep") as bar:
            bar.update()
        assert ("counting" in capsys.readouterr().err) is (outer and inner)


def test_a_log_gets_whole_lines_now_and_then(monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    with progress.bar("counting", " sheep", 5, done=1) as bar:
        for number in range(4):
            bar.set_postfix_str(f"{number} jumped")
            bar.update()
    assert capsys.readouterr().err == ("counting: 3 of 5 sheep in 40 s, about 40 s left; 1 jumped\n"
                                       "counting: 5 of 5 sheep in 80 s; 3 jumped\n")


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.bar("counting", " sheep", 5) as bar:
        bar.set_description("counting again")
    assert "counting again:   0%|" in terminal.getvalue()
    assert terminal.getvalue().rsplit("\r", 2)[1].strip() == ""
