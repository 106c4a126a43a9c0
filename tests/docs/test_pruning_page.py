"""What docs/pruning.md shows is what happens, by a clock that counts MACs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import run

from fastscore.pruning.budgets import latency
from fastscore.pruning.budgets.costs import total_macs
from fastscore.pruning.report import Timing

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(one: Any, two: Any, device: torch.device, patience: int = 1) -> Timing:
        (dense, x), (other, _) = one.args, two.args
        return Timing((1e-3, 1e-3 * total_macs(other, x) / total_macs(dense, x)), 0.0)

    monkeypatch.setattr(latency, "time_pair", clock)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run(PAGE)
    assert {path.name for path in tmp_path.iterdir()} == {"pruned.png", "steps.safetensors", "small.safetensors"}
    assert names["result"].report.macs[1] / names["result"].report.macs[0] <= 0.7
