"""Clocks that are other runtimes: they compute what PyTorch does, their time is measured, and what they do not take is
refused before anything is done."""

import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.pruning.budgets import clocks, latency
from fastscore.pruning.options import Budgets, multiple
from fastscore.pruning.report import PruneReport

RUNTIMES = ["onnxruntime", "openvino"]


def narrow() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.mark.parametrize("clock", RUNTIMES)
def test_a_runtime_computes_what_pytorch_does(clock: Any) -> None:
    model, x = narrow(), torch.randn(2, 3, 16, 16)
    twice = clocks.runner(clock, model, x, lambda model, batch: {"logits": 2 * model(batch)})()
    values: Any = next(iter(twice.values())) if hasattr(twice, "values") else twice[0]  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(values), 2 * model(x), rtol=2e-2, atol=2e-3)  # OpenVINO: bfloat16


@pytest.mark.parametrize("clock", RUNTIMES)
def test_a_budget_by_a_runtime(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, really: whatever it says is met, and the report says by which clock."""
    monkeypatch.setattr(latency, "_SECONDS", 0.05)
    model, x = narrow(), torch.randn(4, 3, 48, 48)  # of which one channel takes far less time, on a busy machine, too
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    with untouched(model):
        report = fastscore.prune(model, scores, x, latency=0.9, clock=clock).report
    (chosen,) = (tried for tried in report.candidates if tried.chosen)
    assert chosen.timing.clock == clock
    assert 0 < chosen.timing.share <= 0.9
    assert f"of the MACs, by {clock}\n" in str(report)
    assert len(report.candidates) <= 12
    assert PruneReport.of(asdict(report)).candidates == report.candidates


def test_what_a_clock_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NETWORKS["residual"].model(), NETWORKS["residual"].inputs(2)
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)

    def called(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return call_model(model, batch["x"])

    with untouched(model):
        for options, named in (({"clock": "sundial", "latency": 0.5}, "'sundial' is none of torch, onnxruntime, "),
                               ({"clock": "openvino", "channels": 0.5}, "'openvino' measures a budget in time, "),
                               ({"clock": "openvino", "macs": 0.5}, "'openvino' measures a budget in time")):
            with pytest.raises(ValueError, match=f"^clock: {named}"):
                fastscore.prune(model, scores, x, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="clock: onnxruntime runs models of one tensor, and example_inputs are "):
            fastscore.prune(model, scores, {"x": x}, latency=0.5, clock="onnxruntime", forward=called)
        with pytest.raises(ValueError, match="clock: openvino runs on the CPU here, and the model is on meta: move it"):
            clocks.check("openvino", 0.5, nn.Linear(2, 2, device="meta"), x)
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(ImportError, match=r"pip install 'torch-fastscore\[openvino\]'"):
            fastscore.prune(model, scores, x, latency=0.5, clock="openvino")


def test_widths_are_those_that_the_runtime_of_the_clock_likes() -> None:
    """Where nothing else is said; ONNX Runtime took longer with fewer channels of any number."""
    assert [multiple(None, 0.7, clock) for clock in ("torch", "onnxruntime", "openvino")] == [1, "auto", "auto"]
    assert multiple(None, None, "torch") == 1
    assert [multiple(given, 0.7, "onnxruntime") for given in (1, 8, "auto")] == [1, 8, "auto"]
    with pytest.raises(ValueError, match=r"latency: 15\.0 is outside .* of the dense model's time, not milliseconds"):
        Budgets(latency=15.0)
