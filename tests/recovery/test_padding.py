"""Padding decides nothing: figures do not depend on how far a batch of tokens is padded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.recovery.decisions import Decisions

LENGTH = 6


class Tokens(nn.Module):
    """Each token by itself."""

    def __init__(self, columns: int = 5) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(30, 12), nn.Linear(12, 24), nn.Linear(24, columns)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.up(self.embedding(input_ids)).relu())  # type: ignore[no-any-return]


def batches(padding: int) -> list[Any]:
    """The same tokens, `padding` more of token 0 behind them; without any padding where that is 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (48, LENGTH), generator=generator)
    real = torch.arange(LENGTH + padding) < LENGTH
    ids = torch.cat([ids, ids.new_zeros(48, padding)], 1)
    return [{"input_ids": part, "attention_mask": real.long().expand(len(part), -1)} for part in ids.split(12)]


@pytest.mark.parametrize("outputs", [None, {"": "error"}])
def test_reports_and_curves_are_of_tokens_that_are_real(outputs: Any) -> None:
    """With twice as much padding as text, two of three decisions were about the same token 0."""
    torch.manual_seed(0)
    model = Tokens().eval()
    given: Any = {"repair": "auto", "outputs": outputs, "progress": False}
    found = []
    for padding in (0, 2 * LENGTH):
        calibration = batches(padding)
        scores = fastscore.score(model, calibration, ablation="mean", progress=False)
        pruned = fastscore.prune(model, scores, calibration[0], channels=0.5, calibration=calibration, **given)
        bounded = fastscore.prune(model, scores, calibration[0], kl=0.2, calibration=calibration, **given)
        curve = fastscore.curve(model, scores, calibration, channels=(0.5,), **given)
        found.append([(row.kl, row.agreement, row.decisions) for row in pruned.report.repairs]
                     + [(row.kl, row.agreement, row.decisions) for row in bounded.report.judged]
                     + [(point.kl, point.agreement, curve.decisions) for point in (curve.rows[0].cut,)])
    assert found[0][0][2] == (0 if outputs else 12 * LENGTH)  # of 48 samples, 12 are held out
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_outputs_that_are_not_of_tokens_stay_whole() -> None:
    batch = batches(LENGTH)[0]
    run = Decisions(lambda model, batch: {"tokens": torch.randn(12, 2 * LENGTH, 5), "labels": torch.randn(12, 4),
                                          "image": torch.randn(12, 2 * LENGTH, 4, 4), "other": torch.randn(12, 3, 5)})
    shapes = {name: list(output.shape) for name, output in run(nn.Identity(), batch).items()}
    assert shapes == {"['tokens']": [12 * LENGTH, 5], "['labels']": [12, 4], "['image']": [12, 2 * LENGTH, 4, 4],
                      "['other']": [12, 3, 5]}
