"""What docs/recovery.md shows is what happens: to the first blocks of its network, with FASTSCORE_NIGHTLY=1 to all."""

import os
import re
from pathlib import Path

import pytest
import torch
import torchvision
from pages import run
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from fastscore.pruning.budgets.quality import samples_needed

PAGE = Path(__file__).parents[2] / "docs" / "recovery.md"


def short(num_classes: int) -> nn.Module:
    """A MobileNetV3 of three blocks."""
    rows = ((16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 24, False, "RE", 2), (24, 3, 88, 24, False, "HS", 1))
    return MobileNetV3([InvertedResidualConfig(*row, 1, 1.0) for row in rows], 128, num_classes)


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if "FASTSCORE_NIGHTLY" not in os.environ:
        monkeypatch.setattr(torchvision.models, "mobilenet_v3_small", short)
    torch.manual_seed(0)
    names = run(PAGE)
    report = names["result"].report
    assert report.macs[1] / report.macs[0] <= 0.7
    assert {"none", "mean", "linear", "asymmetric"} == {row.name for row in report.repairs}
    assert [row.name for row in names["repaired"].report.repairs] == ["none", *["linear"] * 3]
    judged = names["smallest"].report.judged
    assert all((row.agreement >= 0.9) >= row.chosen for row in judged)


def test_its_numbers_of_samples_are_those_that_a_bound_takes() -> None:
    page = " ".join(PAGE.read_text().split())
    found = re.search(r"0\.98 at 95 % takes (\d+) samples .*?\(0\.95: (\d+); 0\.99: (\d+)\)", page)
    assert found is not None
    assert [int(number) for number in found.groups()] == [samples_needed(share, 0.95)
                                                          for share in (0.98, 0.95, 0.99)]
    few = re.search(r"(\d+) that all agree show that ([\d.]+) % of others do", page)
    assert few is not None
    assert float(few[2]) / 100 == pytest.approx(0.05 ** (1 / int(few[1])), abs=5e-4)
