"""docs/integrations.md does what it shows, block after block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pages import blocks
from torch import nn

import fastscore

PAGE = Path(__file__).parents[2] / "docs/integrations.md"


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    """Accelerate's state is one for the process: neither other tests' here, nor this page's in theirs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")
def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    found: list[fastscore.Scores] = []
    widths = []
    for block in blocks(PAGE):
        exec(compile(block, PAGE.name, "exec"), names)
        for name in ("callback", "scorer"):
            scores = getattr(names.get(name), "scores", None)
            found.append(scores() if callable(scores) else scores)
        widths.append([module.out_channels for module in names["model"].modules() if isinstance(module, nn.Conv2d)]
                      if "model" in names else None)
    assert widths[1] == [4, 8]  # by Torch-Pruning, in two steps
    with torch.no_grad():  # what from_pretrained loads is what prune made
        small, result, (photos, _) = names["small"], names["result"], names["photos"]
        assert small.config.intermediate_size == 24
        torch.testing.assert_close(small(**photos).logits, result.model.eval()(**photos).logits)
    measured = [scores for scores in found if isinstance(scores, fastscore.Scores)]
    assert {scores.samples for scores in measured} == {16}
    assert {"0", "4"} < {layer for scores in measured for layer in scores}
    for file in ("scores.safetensors", "bert.safetensors"):
        assert fastscore.Scores.load(file).samples == 16
