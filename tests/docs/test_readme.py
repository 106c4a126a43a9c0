"""What the README says is what happens."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import fastscore
from fastscore import cli
from fastscore.cli import digits
from fastscore.scoring.criteria import NAMES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["scores"], fastscore.Scores)
    dense, smaller = names["result"].report.macs
    assert smaller <= dense / 2
    assert torch.export.load("small.pt2").module()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fastscore ")]


@pytest.mark.parametrize("command", commands())
def test_its_commands_are_understood(command):
    assert callable(cli.parser().parse_args(shlex.split(command)[1:]).run)


def test_its_importances_are_those_there_are():
    section = README[README.index("## Importances"):README.index("## Limits")]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`=]+)`", row)}
    assert named == set(NAMES)


def test_its_demo_table_is_one_that_the_demo_prints():
    (table,) = (block for block in blocks("") if "test accuracy" in block)
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["dense", *digits.IMPORTANCES]


def test_its_files_are_there():
    for path in re.findall(r"\((docs/[^)]+)\)", README):
        assert (ROOT / path).is_file()
    tree = README[README.index("## Where things are"):]
    for row in [line for line in tree.splitlines() if line.startswith("| `")]:
        names = re.findall(r"`([^`]+)`", row.split("|")[1])
        folder = (ROOT / names[0]).parent
        for name in names:
            assert (folder / name).exists() or (ROOT / name).exists(), name


def test_continuous_integration_runs_its_command_for_the_tests():
    command = next(block.strip() for block in blocks("sh") if "pytest" in block)
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command
