"""What the README says is what happens."""

import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from models_page import on_page
from pages import blocks, run
from torchvision.models.resnet import BasicBlock, ResNet

import fastscore
from fastscore import cli
from fastscore.cli import digits
from fastscore.scoring.criteria import NAMES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
README = PAGE.read_text()


def test_its_python_runs(tmp_path, monkeypatch):
    """With half of the blocks of its ResNet-18; FASTSCORE_NIGHTLY=1 takes all."""
    if "FASTSCORE_NIGHTLY" not in os.environ:
        monkeypatch.setattr(torchvision.models, "resnet18", partial(ResNet, BasicBlock, [1, 1, 1, 1]))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run(PAGE)
    assert isinstance(names["scores"], fastscore.Scores)
    dense, smaller = names["result"].report.macs
    assert smaller <= dense / 2
    assert torch.export.load("small.pt2").module()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def commands():
    lines = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("fastscore ")]


@pytest.mark.parametrize("command", commands())
def test_its_commands_are_understood(command):
    assert callable(cli.parser().parse_args(shlex.split(command)[1:]).run)


def test_the_importances_named_are_those_there_are():
    page = (ROOT / "docs/importances.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`=]+)`", row)}
    assert named == set(NAMES)
    assert "eight other criteria" in README
    assert len(NAMES) == 9


def test_its_figures_are_those_of_the_pages_it_names():
    demo = (ROOT / "docs/demo.md").read_text()
    printed = re.search(r"^```\n(.*?)^```$", demo, re.MULTILINE | re.DOTALL)[1]
    table = [line.split() for line in printed.splitlines()[3:]]
    assert [row[0] for row in table] == ["dense", *digits.IMPORTANCES]
    kept = {row[0]: row for row in table}
    assert f"| **{kept['fastscore'][1]} %**, {kept['fastscore'][5]} % after the repair " \
        f"| magnitude {kept['magnitude'][1]} %; random channels {kept['random'][5]} % after the repair |" in README

    recovery = (ROOT / "docs/recovery.md").read_text()
    after = [re.search(rf"^\| {row} \|(.*)\|$", recovery, re.MULTILINE)[1].split("|")[3].strip()
             for row in ("the default, which took asymmetric", "per MAC, mean compensation",
                         "importance alone, mean compensation")]
    assert "| **{} %** after the repair, {} % before | {} % by plain importance |".format(*after) in README

    speed = (ROOT / "docs/speed.md").read_text()
    (head,) = (line for line in speed.splitlines() if line.startswith("| | ResNet-18"))
    column = [cell.strip() for cell in head.split("|")].index("ResNet-50")
    ratio = {row: round(float(re.search(rf"^\| \*\*fastscore, {row}\*\*(.*)$", speed, re.MULTILINE)[1]
                              .split("|")[column - 1].strip(" *")), 1)
             for row in ("`taylor-sq`, random gradient", '`precision="bfloat16"`')}
    assert re.findall(r"\*\*([\d.]+) times\*\*", README)[:2] == [str(value) for value in ratio.values()]

    rows = list(on_page().values())
    done = [row for row in rows if "wrong: " not in row
            and (row.split(" | ")[9:10] == ["yes"] or row.split(" | ")[5] == "yes")]
    assert f"[without a flag](docs/models.md) | {len(done)} of {len(rows)} | |" in README


def test_its_links_lead_somewhere():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / path).is_file(), path


def test_continuous_integration_runs_its_command_for_the_tests():
    command = next(block.strip() for block in blocks(PAGE, "sh") if "pytest" in block)
    assert (ROOT / ".ci/run").read_text().endswith(f"activate\n{command}\n")
