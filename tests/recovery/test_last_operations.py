"""Outputs of several columns that are no logits: images within bounds, directions, probabilities of several labels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.recovery.decisions import Decisions

ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "normalize": lambda x: nn.functional.normalize(x, dim=1),
    "tanh, as an image": lambda x: x.tanh().view(-1, 3, 2, 1), "sigmoid, in place": lambda x: (2 * x).sigmoid_()}
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "capped": lambda x: 30 * torch.tanh(x / 30), "capped in place": lambda x: (x / 30).tanh_().mul_(30),
    "gated": lambda x: x * torch.sigmoid(x),
    "of directions": lambda x: nn.functional.normalize(x, dim=1) @ torch.eye(6)}


def judged(end: Callable[[Tensor], Any], outputs: Any = None) -> Decisions:
    run = Decisions(lambda model, batch: end(batch), outputs)
    run(nn.Identity(), torch.randn(4, 6))
    return run


@pytest.mark.parametrize("end", ENDS)
def test_what_no_logit_can_be_is_judged_by_its_error(end: str) -> None:
    run = judged(ENDS[end])
    assert run.errors == {""}
    assert f", which {end.partition(',')[0]} made last; where the largest decides, say so: " in str(run)
    assert str(run).endswith('outputs={"": "decision"} (--outputs decision)')
    said = judged(ENDS[end], {"": "decision"})
    assert not said.errors
    assert str(said).startswith("by the largest of ")


@pytest.mark.parametrize("end", LOGITS)
def test_what_goes_on_from_there_decides(end: str) -> None:
    run = judged(LOGITS[end])
    assert not run.errors
    assert str(run).endswith('; where those are values, say so: outputs={"": "error"} (--outputs error)')


def test_of_several_outputs_each_has_its_own_end() -> None:
    def end(x: Tensor) -> dict[str, Tensor]:
        return {"classes": x, "labels": x.sigmoid(), "scalar": x[:, 0]}

    run = judged(end)
    assert run.errors == {"['labels']", "['scalar']"}
    assert "(R²: 1 - that), which sigmoid made last; ['scalar'] by squared error" in str(run)
    assert 'outputs={\'labels\': "decision"}' in str(judged(end, ["labels"]))
    assert judged(end, {"classes": "error", "labels": "decision"}).errors == {"['classes']"}


def test_a_generator_is_repaired_by_its_error() -> None:
    """Its image's largest channel was its decision: so said the report, and so chose the repair."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2),
                          nn.Tanh()).eval()
    batches = list(torch.randn(64, 6, 1, 1).split(16))
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    report = fastscore.prune(model, scores, batches[0], channels=0.5, calibration=batches, progress=False).report
    chosen = next(row for row in report.repairs if row.chosen)
    assert chosen.by_error
    assert chosen.kl == min(row.kl for row in report.repairs)
    assert f"R² {chosen.agreement:.1%}, error {chosen.kl:.3g}" in str(report)
