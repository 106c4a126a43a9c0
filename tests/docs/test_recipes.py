"""docs/recipes.md does what it shows, block after block, and agreement is what the page says."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import run

import fastscore
from fastscore import cli
from fastscore.cli import digits

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipes"))
        return run(PAGE)


def test_pruned_quantised_and_both_agree_with_the_dense_network(names: dict[str, Any]) -> None:
    said = [float(share) / 100 for share in re.search(r"to (\d+), (\d+) and (\d+) %", PAGE.read_text()).groups()]
    found = names["agreements"]
    assert list(found) == ["dense-int8.onnx", "small.onnx", "small-int8.onnx"]
    for (path, share), least in zip(found.items(), said, strict=True):
        assert share >= least, path


def test_the_loaded_network_is_the_smaller_one(names: dict[str, Any]) -> None:
    small, images = names["small"], names["data"].test[0]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in digits.network().parameters())
    with torch.no_grad():
        share = float((small(images).argmax(1) == names["model"](images).argmax(1)).float().mean())
    assert share == pytest.approx(names["agreements"]["small.onnx"], abs=2e-3)  # the file computes what the module does


def test_its_commands_are_understood() -> None:
    rows = re.findall(r"\| `((?:fastscore|torchrun) [^`]+)` \|", PAGE.read_text())
    assert len(rows) == 6
    for row in rows:
        words = shlex.split(row)
        assert callable(cli.parser().parse_args(words[words.index("fastscore") + 1:]).run)


def test_every_network_meets_its_budget(names: dict[str, Any]) -> None:
    report = names["result"].report  # the last: the language model's
    assert report.params[1] / report.params[0] <= 0.85
    assert names["result"].model.lm_head.out_features == 48
    assert isinstance(names["scores"], fastscore.Scores)
