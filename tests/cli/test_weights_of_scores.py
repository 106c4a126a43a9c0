"""`--scores` and the weights of the model: missing ones are an error, other ones are kept apart from the scores'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import working_folder

import fastscore
from fastscore.cli import main, models, options
from fastscore.cli.checkpoints import sha256

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def named():
    return build()
"""
THEN = "2020-01-02 03:04+00:00"
SUFFIX = {"prune": "safetensors", "curve": "json"}
NOW = "2021-01-02 03:04+00:00"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nets.py, four images, one.pt and other.pt, and s: scores of the weights in one.pt, made long ago."""
    shades = torch.tensor([[60 * number, 20, 90] for number in range(4)], dtype=torch.uint8)
    working_folder.enter(tmp_path, monkeypatch, NETS, shades[:, None, None].repeat(1, 8, 8, 1))
    for seed, file in enumerate(("one.pt", "other.pt")):
        torch.save(models.load("nets.py:build", seed=seed).state_dict(), file)
    noted("s", "--checkpoint", "one.pt")


def noted(path: str, *weights: str, **notes: str) -> None:
    """Scores in a file, made long ago, with more `notes`."""
    assert main(["score", "nets.py:build", *weights, "--size", "8", "--images", "photos", "--out", path]) == 0
    scores = fastscore.Scores.load(path)
    fastscore.Scores(**{**vars(scores), "notes": {**scores.notes, "date": THEN, **notes}}).save(path)


def command(name: str, *arguments: str, model: str = "nets.py:build", out: str = "") -> list[str]:
    budget = ["--images", "photos", "--repair", "mean"] if name == "curve" else []
    return [name, model, *arguments, *budget, "--macs", "0.7", "--out", out or f"small.{SUFFIX[name]}"]


@pytest.mark.parametrize("name", ["prune", "curve"])
@pytest.mark.parametrize("model", ["nets.py:build", "nets:build"])
def test_scores_of_trained_weights_need_them(name: str, model: str, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256("one.pt")
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", None)  # nothing is built for it
        for change, way in ((lambda: None, "add --checkpoint one.pt"),
                            (lambda: Path("one.pt").write_bytes(Path("other.pt").read_bytes()),
                             "add --checkpoint FILE, the file with those weights (one.pt is another now)"),
                            (Path("one.pt").unlink,
                             "add --checkpoint FILE, the file with those weights (one.pt is not there now)")):
            change()
            capsys.readouterr()
            assert main(command(name, "--scores", "s", model=model)) == 2
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"fastscore: error: scores: s is of one.pt (sha256 {digest}), and no weights are given for {model}: "
                f"{way}")
    assert not list(Path().glob("small.*"))


def test_downloaded_weights_are_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    noted("w", weights="DEFAULT")
    assert main(command("prune", "--scores", "w")) == 2
    assert "w is of the weights DEFAULT, and no weights are given for nets.py:build: add --weights DEFAULT" in \
        capsys.readouterr().err


def test_a_function_that_loads_its_own_weights_is_asked_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    noted("own")
    assert main(command("prune", "--scores", "own")) == 0
    assert main(command("prune", "--scores", "s", "--size", "8", model="nets.py:named")) == 0  # may load them itself
    assert "s is of nets.py:build, and this is nets.py:named" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["small.safetensors", "small.pt2", "small.onnx", "small.pt"])
def test_a_file_says_which_weights_it_holds(out: str, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_now", lambda: NOW)
    ours, theirs = (f"{file} (sha256 {sha256(file)})" for file in ("other.pt", "one.pt"))
    scored = fastscore.Scores.load("s").notes
    capsys.readouterr()
    assert main([*command("prune", "--checkpoint", "other.pt", "--scores", "s", out=out), "--json"]) == 0
    told = capsys.readouterr()
    assert f"s is of {theirs}, and other.pt is another file" in told.err
    assert main(["info", out, "--json"]) == 0
    for notes in (json.loads(told.out)["notes"], json.loads(capsys.readouterr().out)[out]):
        notes.pop("remains", None)
        assert notes == {**scored, "checkpoint": ours, "date": NOW, "scores": (
            f"s; model nets.py:build; checkpoint {theirs}; options --size 8; date {THEN}; "
            f"versions {scored['versions']}")}


def test_a_curve_says_which_weights_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, dict[str, Any]] = {}
    for file in ("one.pt", "other.pt"):
        assert main(command("curve", "--checkpoint", file, "--scores", "s", out=f"{file}.json")) == 0
        found[file] = json.loads(Path(f"{file}.json").read_text())
        assert found[file]["scores"] == fastscore.Scores.load("s").notes
        assert found[file]["notes"]["checkpoint"] == f"{file} (sha256 {sha256(file)})"
        assert found[file]["notes"]["date"] > THEN
    assert main(["report", "s", "--curve", "one.pt.json", "--out", "r.html"]) == 0
    assert main(["report", "s", "--curve", "other.pt.json", "--out", "r.html"]) == 2
    assert "was measured on another model, whose checkpoint is other.pt (sha256 " in capsys.readouterr().err
    shutil.copy("one.pt", "moved.pt")
    assert main(command("curve", "--checkpoint", "moved.pt", "--scores", "s", out="moved.json")) == 0
    assert main(["report", "s", "--curve", "moved.json", "--out", "r.html"]) == 0  # the same weights, elsewhere
