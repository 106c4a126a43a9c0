"""Long runs from the command line, and what the other commands say: stopped, gone on with, looked at."""

import argparse
import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import interruptible
import pytest
import torch
from interruptible import MODEL, folder

import fastscore
from fastscore import cli
from fastscore.cli import bench, models
from fastscore.scoring import run_file

SCORE = ["score", *MODEL]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_file, "SHARE", float("inf"))
    monkeypatch.setenv("SAMPLES", "4")  # scoring; tracing takes fewer
    with folder(tmp_path, monkeypatch, images=17):
        yield


def run(*arguments: str, stop: int = 0) -> int:
    """The command's exit code; Ctrl-C in batch number `stop`."""
    return interruptible.run(arguments, stop)


def assert_same_bits(one: str, other: str) -> None:
    ours, theirs = fastscore.Scores.load(one), fastscore.Scores.load(other)
    assert all(torch.equal(ours.totals[layer], theirs.totals[layer]) for layer in ours)
    assert (ours.samples, ours.half_passes) == (theirs.samples, theirs.half_passes)


@pytest.mark.parametrize("options", [[], ["--probes", "exact"], ["--samples", "13", "--fixed-order"]])
def test_interrupted_and_gone_on_with(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run(*SCORE, *options, "--out", "whole") == 0
    command = [*SCORE, *options, "--out", "s", "--resume", "s.ckpt"]
    capsys.readouterr()
    assert run(*command, stop=3) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-2:] == [
        "fastscore: what was scored is kept in s.ckpt; the same command goes on from there", "fastscore: interrupted"]
    assert not Path("s").exists()
    assert run(*command) == 0
    assert_same_bits("s", "whole")
    assert run(*command) == 0  # nothing is left to do
    assert_same_bits("s", "whole")


def test_a_run_that_goes_on_says_from_where(capsys: pytest.CaptureFixture[str]) -> None:
    """And info reads its file."""
    command = [*SCORE, "--out", "s", "--resume", "s.ckpt"]
    assert run(*command, stop=3) == 130
    assert "goes on from s.ckpt, " not in capsys.readouterr().err  # it started
    for _ in range(2):
        assert run("info", "s.ckpt", "--json") == 0
        noted = json.loads(capsys.readouterr().out)["s.ckpt"]
        assert (noted["importance"], noted["fixed_order"]) == ("taylor-sq", "False")
        batches, samples = noted["done"].split(", ")
        assert run(*command) == 0
        assert (f"note: resume: goes on from s.ckpt, after {batches} ({samples}) that are scored; no option is "
                "ignored: other ones than then would be refused\n") in capsys.readouterr().err
    assert (batches, samples) == ("5 batches", "17 samples")


def test_interrupted_without_a_file_to_keep_it_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SCORE, "--out", "whole") == 0
    Path("s.ckpt").write_text("somebody's own")
    assert run(*SCORE, "--out", "s", stop=2) == 130
    said = capsys.readouterr().err
    assert "is kept in s-2.ckpt; the same command with --resume s-2.ckpt goes on from there" in said
    assert Path("s.ckpt").read_text() == "somebody's own"
    assert run(*SCORE, "--out", "s", "--resume", "s-2.ckpt") == 0
    assert_same_bits("s", "whole")


def test_interrupted_before_anything_was_scored(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path().iterdir())
    assert run(*SCORE, stop=1) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastscore: interrupted"
    assert set(Path().iterdir()) - {Path("__pycache__")} == before


@pytest.mark.parametrize(("change", "named"), [
    (["--seed", "1"], "differs in weights, seed;"), (["--probes", "2"], "differs in probes;"),
    (["--samples", "9"], "differs in data;"), (["--batch-size", "5"], "differs in data;"),
    (["--mean", "0", "0", "0.5"], "differs in data;"), (["--importance", "magnitude-l1"], "reads the weights alone"),
    (["--ignore", "0"], "differs in ignored")])
def test_a_run_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str], change: list[str], named: str) -> None:
    assert run(*SCORE, "--resume", "s.ckpt", stop=3) == 130
    kept = Path("s.ckpt").read_bytes()
    capsys.readouterr()
    assert run(*SCORE, *change, "--resume", "s.ckpt") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastscore: error: resume: ")
    assert named in said
    assert Path("s.ckpt").read_bytes() == kept


def test_a_damaged_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SCORE, "--resume", "s.ckpt", stop=3) == 130
    Path("s.ckpt").write_bytes(Path("s.ckpt").read_bytes()[:-1])
    assert run(*SCORE, "--resume", "s.ckpt") == 2
    assert "remove it to start over" in capsys.readouterr().err.splitlines()[-1]


def test_every_way_of_scoring(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SCORE, "--ablation", "mean", "--layerwise", "l2", "--distribution", "orthogonal", "--center",
               "--no-normalize", "--probes", "2", "--samples", "auto", "--precision", "float32", "--json") == 0
    origin = json.loads(capsys.readouterr().out)["origin"]
    assert {name: origin[name] for name in ("ablation", "layerwise", "distribution", "center", "normalize")} == {
        "ablation": "mean", "layerwise": "l2", "distribution": "orthogonal", "center": True, "normalize": False}


@pytest.mark.parametrize("options", [["--probes", "0"], ["--probes", "all"], ["--samples", "-1"], ["--timeout", "0"]])
def test_numbers_that_are_none(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*SCORE, *options)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "it must be" in said
    assert "argument --" not in said or said.split("argument --")[1].count(options[0][2:]) == 1  # its own name, once


def test_a_page_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SCORE, "--out", "s") == 0
    assert run("report", "s", "--out", "s.html", "--title", "Of May", "--fraction", "0.5") == 0
    page = Path("s.html").read_text()
    assert "Of May" in page
    assert page.lstrip().lower().startswith("<!doctype html>")
    for arguments, named in ((["report", "nets.py"], "not a readable safetensors file"),
                             (["report", "none"], "no such score file"),
                             (["report", "s", "--fraction", "2"], "fraction: 2.0"),
                             (["report", "s", "--out", "nowhere/s.html"], "no folder nowhere")):
        assert run(*arguments) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_pruned_model_that_is_no_pickle() -> None:
    assert run("prune", "nets.py:build", "--images", "photos", "--size", "12", "--macs", "0.6", "--scope", "isomorphic",
               "--cost-aware", "--out", "small.safetensors") == 0
    dense = models.load("nets.py:build")
    small = fastscore.load_pruned(dense, "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert small(torch.zeros(2, 3, 12, 12)).shape == (2, 5)


def test_the_plan_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "nets.py:build", "--size", "12") == 0
    scores = fastscore.score(models.load("nets.py:build"), [torch.zeros(2, 3, 12, 12)], progress=False)
    images, _, rest = capsys.readouterr().out.partition("\n")
    assert rest == "\n".join([str(scores.plan), *scores.coverage.lines(),
                              *(f"{layer}: kept ({reason})" for layer, reason in scores.skipped.items()), ""])
    assert scores.skipped
    assert images == ("images: shorter side to 12 pixels (bilinear), the middle 12 x 12, values in [0, 1] (assumed: "
                      "nets.py:build does not say what it was trained with; --mean and --std do)")


def test_bench_divides_what_it_read_by_the_time() -> None:
    """By a clock that moves on by a second whenever it is looked at."""
    now = iter(range(10**6))
    rows = bench.kernels(torch.device("cpu"), 0.0, lambda: next(now))
    assert [(row["dtype"], row["layout"]) for row in rows] == [
        (dtype, layout) for dtype in ("float32", "bfloat16", "float16") for layout in ("contiguous", "channels last")]
    for row in rows:
        size = 16 * 64 * 56 * 56 * 2 * (4 if row["dtype"] == "float32" else 2)
        assert row["fastscore"] == row["eager"] == row["dot"] == pytest.approx(size / 1e9)
    passed = bench.passes(models.load("nets.py:build"), torch.zeros(2, 3, 12, 12), lambda: next(now))
    assert passed == {"training": 1.0, "scoring": 0.0, "tracing": 1.0}


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPE", (2, 8, 8, 8))
    assert run("bench", "nets.py:build", "--size", "12", "--seconds", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["kernels"]) == 6
    assert set(said["passes"]) == {"training", "scoring", "tracing"}
    assert run("bench", "--seconds", "1") == 0
    assert "10⁹ bytes" in capsys.readouterr().out


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in cli.parser()._actions
                  if isinstance(action, argparse._SubParsersAction))
    return dict(choices)


@pytest.mark.parametrize("name", commands())
def test_help_has_examples_that_are_understood(name: str) -> None:
    text = commands()[name].format_help()
    examples = [line.strip() for line in text[text.index("examples:"):].splitlines()[1:]]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        arguments = words[words.index("fastscore") + 1:]
        assert arguments[0] == name
        assert callable(cli.parser().parse_args(arguments).run)
    assert max(map(len, text.splitlines())) <= 160


def test_commands_on_the_page_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("fastscore ", "torchrun "))]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        assert callable(cli.parser().parse_args(words[words.index("fastscore") + 1:]).run)


def test_signals_are_as_they_were() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run(*SCORE, stop=2) == 130
    assert signal.getsignal(signal.SIGINT) is before
