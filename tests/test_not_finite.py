"""NaN or infinity in a sample of the batches: the error names the sample, whether it would fit or judge."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore

REPAIRS = ("mean", "linear", "asymmetric", "auto")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def ways(model: nn.Module, scores: fastscore.Scores, smaller: Any, batches: list[Tensor], bad: list[Tensor]
         ) -> dict[str, tuple[str, Callable[[], object]]]:
    given: Any = {"calibration": bad, "progress": False}
    found: dict[str, tuple[str, Callable[[], object]]] = {
        f"prune {repair}": ("calibration", lambda repair=repair: fastscore.prune(  # type: ignore[misc]
            model, scores, batches[0], macs=0.6, repair=repair, inplace=True, **given)) for repair in REPAIRS}
    return found | {
        "agreement": ("calibration", lambda: fastscore.prune(model, scores, batches[0], agreement=0.5, repair="mean",
                                                             **given)),
        "held_out": ("held_out", lambda: fastscore.prune(model, scores, batches[0], agreement=0.5, repair="mean",
                                                         held_out=bad, **given | {"calibration": batches})),
        "reconstruct": ("batches", lambda: fastscore.reconstruct(model, smaller, bad, "mean", progress=False)),
        "recalibrate": ("batches", lambda: fastscore.recalibrate(model, bad)),
        "distill": ("batches", lambda: fastscore.distill(copy.deepcopy(model), model, bad, steps=8, progress=False)),
        "curve": ("batches", lambda: fastscore.curve(model, scores, bad, (0.6,), repair="mean", progress=False))}


@pytest.mark.parametrize(("row", "value"), [(0, torch.nan), (1, torch.inf)])  # fits; is held out
def test_the_sample_is_named_before_anything_changes(row: int, value: float) -> None:
    model, batches = network(), list(torch.randn(64, 1, 8, 8).split(16))
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    smaller = fastscore.prune(model, scores, batches[0], macs=0.6, progress=False)
    bad = [batch.clone() for batch in batches]
    bad[2][row, 0, 3, 3] = value
    before = {name: each.clone() for name, each in model.state_dict().items()}
    for name, (argument, call) in ways(model, scores, smaller, batches, bad).items():
        said = rf"; {argument}: sample {row} of batch 2 \(counted from 0\) holds such a value: leave it out$"
        with pytest.raises(FloatingPointError, match=said) as raised:
            call()
        assert str(raised.value).count("(counted from 0)") == 1, name
        assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items()), name


def test_of_several_the_first_is_named() -> None:
    model, batches = network(), list(torch.randn(64, 1, 8, 8).split(16))
    batches[1][3:5], batches[3][7] = torch.nan, torch.nan
    with pytest.raises(FloatingPointError, match=r"batches: sample 3 of batch 1 \(counted from 0\) and 2 other samples "
                                                 "hold such a value: leave them out"):
        fastscore.recalibrate(model, batches)


def test_of_a_network_that_makes_them_no_sample_is_named() -> None:
    model, batches = network(), list(torch.randn(32, 1, 8, 8).split(16))
    with torch.no_grad():
        model[0].weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"1: NaN or infinity in what it reads of the batches$"):
        fastscore.recalibrate(model, batches)
