"""benchmarks.passes.precision: its table, on networks of a few channels."""

import csv
from pathlib import Path

import pytest
import torch
from networks import NETWORKS

from benchmarks.passes import precision


def test_a_row_for_each_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                   ) -> None:
    network = NETWORKS["residual"]
    monkeypatch.setattr(precision, "networks", lambda data, images: [
        ("small", network.model().float(), network.inputs(images).float())])
    precision.main(["--data", "nowhere", "--images", "16", "--out", str(tmp_path / "precision.csv")])
    with (tmp_path / "precision.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["importance"], row["compared"]) for row in rows] == [
        (importance, compared) for importance in precision.IMPORTANCES for compared in ("bfloat16", "another seed")]
    rounded, reseeded = (float(row["rank"]) for row in rows[:2])
    assert 0.9 < rounded <= 1
    assert reseeded < rounded
    assert "small, taylor-sq, bfloat16" in capsys.readouterr().out


def test_agreement_by_hand() -> None:
    """Ten channels, of which the two lowest have changed places with the third and fourth."""
    one = {"a": torch.arange(6.0), "b": torch.arange(6.0, 10.0)}
    other = {"a": torch.tensor([2.0, 3, 0, 1, 4, 5]), "b": one["b"]}
    found = precision.agreement(one, other)
    assert found == {"rank": pytest.approx(1 - 6 * 16 / 990), "10%": 0, "30%": pytest.approx(2 / 3), "50%": 1}
