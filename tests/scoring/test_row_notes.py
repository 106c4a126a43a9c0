"""What is said of rows that do not say themselves what they stand for."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.pruning.report import PruneReport


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTM(6, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)[0])[0].sum(1))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "states":
        return Recurrent().double().eval()
    if name == "branches":
        block = Residual(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        return nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 3)).double().eval()
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
                         nn.Linear(8, 3)).double().eval()


@pytest.mark.parametrize(("name", "units", "said"), [
    ("states", "groups", ["one.weight_ih_l0 and 1 more: a unit of the state is a channel in every gate"]),
    ("branches", "blocks", ["a row of one channel is a residual branch"]),
    ("heads", "groups", []),
    ("heads", "heads_and_dims", ["head dimensions: ", "whole heads: what goes with a head"]),
])
def test_one_line_for_each_kind(name: str, units: Any, said: list[str]) -> None:
    model, x = _model(name), torch.randn(3, 4, 6, dtype=torch.float64)
    scores = fastscore.score(model, [x], units=units, progress=False)
    report = fastscore.prune(model, scores, x, channels=0.8, progress=False).report
    for notes, text in ((scores.row_notes, str(scores)), (report.row_notes, str(report))):
        assert len(notes) == len(said)
        assert all(note.startswith(start) for note, start in zip(notes, said, strict=True))
        assert all(text.count(note) == 1 for note in notes)
    assert PruneReport.of(asdict(report)).row_notes == report.row_notes


def test_a_row_that_loses_no_channel_and_yet_costs_less_says_why() -> None:
    """Its layers read fewer; one that loses none and reads as many says nothing."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    scores = fastscore.score(model, [x], progress=False)
    with torch.no_grad():
        scores.totals["2"].fill_(float(scores.totals["0"].max()) * 2)
    result = fastscore.prune(model, scores, x, channels=0.6, cost_aware=False)
    lines = {line.split()[0]: line for line in str(result.report).splitlines()}
    assert [(row.layer, row.channels) for row in result.report.groups] == [("0", (8, 2)), ("2", (6, 6))]
    assert lines["2"].endswith(" its layers read fewer channels")
    assert "its layers" not in lines["0"]
    assert "its layers" not in str(fastscore.prune(model, scores, x, channels=1.0).report)
