"""What is measured becomes rows, tables and charts: who is compared, what is kept, and what stood there before."""

import argparse
import itertools
from functools import partial

import pytest
import torch
from tasks import task_of

from benchmarks import machine
from benchmarks.peers import __main__ as peers
from benchmarks.peers import chart, growth
from benchmarks.peers.contestants import BASELINE
from benchmarks.peers.measure import CannotRun, Row, compare
from benchmarks.peers.task import Task


def test_compare_takes_ratios_within_rounds_and_says_who_cannot_run():
    taken = {"slow": itertools.cycle([99.0, 6.0, 8.0, 9.0]), "fast": itertools.cycle([99.0, 2.0, 4.0, 1.0])}

    def prepare(name):
        def run(clock):
            clock.seconds = next(taken[name])
            return name

        return run

    def out():
        raise CannotRun("it has no wheels")

    def broken():
        return lambda clock: 1 / 0

    found = compare({"slow": partial(prepare, "slow"), "fast": partial(prepare, "fast"), "out": out, "broken": broken},
                    "slow", 3, "cpu", note=str.upper)
    assert found["out"] == {"note": "it has no wheels"}
    assert found["broken"] == {"note": "ZeroDivisionError: division by zero"}
    assert found["fast"] == {"peak_mib": 0, "note": "FAST", "seconds": 2.0, "times_as_fast": 3.0, "least": 2.0,
                             "most": 9.0}
    assert found["slow"]["times_as_fast"] == 1


def test_growth_varies_one_factor_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "SIZES", (64, 224))
    monkeypatch.setattr(growth, "DEPTHS", ("a",))
    monkeypatch.setattr(growth, "PROBES", (1, 2))
    monkeypatch.setattr(growth, "TAPPED", (0.5, 1.0))
    made = []

    def make(name, images, size):
        made.append((name, images, size))
        return task_of("plain", min(images, 3))

    rows = [row for _, table in growth.tables(make, 1, "cpu") for row in table]
    assert not [row.note for row in rows if row.note]
    assert [row.model for row in rows if row.part == "taps"] == ["1", "1", "2", "2"]
    assert {row.part for row in rows} == set(growth.FACTORS)
    chart.draw(rows, {"processor": "x"}, tmp_path / "t.csv")
    assert (tmp_path / "t-growth.png").stat().st_size > 1000
    assert not (tmp_path / "t.png").exists()  # it is for passes
    assert made[:2] == [("resnet18", 1, 224), ("resnet18", 2, 224)]
    assert ("a", 8, 224) in made


def test_command_writes_table_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "settle", lambda arguments: None)

    def command(part, *models):
        peers.main(["--models", *models, "--contestants", "fastscore, random", "--parts", part, "--batch", "1",
                    "--size", "32", "--repeats", "1", "--out", str(tmp_path / "peers")])
        return chart.read_csv(tmp_path / "peers.csv")

    rows, facts = command("pass", "resnet18")
    assert [(row.model, row.contestant) for row in rows] == [
        ("resnet18", contestant) for contestant in (BASELINE, "fastscore, random", "fastscore, random, no graph")]
    assert all(row.seconds > 0 and row.peak_mib > 0 for row in rows)
    assert facts["allocator"] == machine.malloc()
    assert machine.malloc() in capsys.readouterr().out
    assert (tmp_path / "peers.png").stat().st_size > 1000
    kept, _ = command("per-sample", "resnet18")
    assert kept[:3] == rows
    assert [(row.part, row.contestant) for row in kept[3:]] == [
        ("per-sample", name) for name in ("Torch-Pruning, Hessian", "fastscore, random")]
    assert kept[3].times_as_fast == 1


@torch._dynamo.config.patch(recompile_limit=1)
def test_as_many_models_are_compiled_as_there_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(Task, "random", lambda name, *how: task_of(name))
    arguments = argparse.Namespace(batch=None, size=8, device="cpu", layout="contiguous", repeats=1,
                                   contestants=["plain hooks, compiled"], without=[])
    for name in ("plain", "inplace", "dense"):
        rows = list(peers.passes("pass", name, arguments))
        assert [(row.contestant, row.note) for row in rows] == [(BASELINE, ""), ("plain hooks, compiled", "")]


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    def row(model, contestant, seconds, images=8):
        return Row("pass", model, contestant, images, 224, seconds, 1.0, 1.0, 1.0, 1.0)

    path = tmp_path / "t.csv"
    file = chart.File(path, {"threads": 2})
    file.add([row("a", BASELINE, 3.0), row("a", "gates", 4.0)])
    file.add([row("b", BASELINE, 5.0)])
    again = chart.File(path, {"threads": 2})
    again.add([row("a", BASELINE, 2.0, images=16)])
    again.add([row("a", BASELINE, 2.0)])
    assert chart.read_csv(path) == ([row("a", BASELINE, 2.0), row("b", BASELINE, 5.0),
                                     row("a", BASELINE, 2.0, images=16)], {"threads": "2"})
    with pytest.raises(SystemExit, match="threads"):
        chart.File(path, {"threads": 1})


def test_table_keeps_those_who_could_not_run(tmp_path):
    rows = [Row("pass", "a", BASELINE, 8, 224, 2.0, 1.0, 1.0, 1.0, 1.0),
            Row("pass", "a", "gates", 8, 224, note='it says "no", and a comma'),
            Row("pass", "a", "fastscore, random", 8, 224, 1.0, 1.0, 2.0, 1.5, 2.5)]
    chart.write_csv(rows, {"threads": 2}, tmp_path / "t.csv")
    assert chart.read_csv(tmp_path / "t.csv") == (rows, {"threads": "2"})
    chart.draw(rows[::-1], {"processor": "x"}, tmp_path / "t.csv")  # in any order
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert "no" in peers.line(rows[1])
