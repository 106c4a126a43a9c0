"""reconstruct(resume=): a repair that was stopped goes on, and ends with the weights of one that was not."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from started import environment
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.recovery.moments import Moments
from fastscore.scoring import run_file

RESIDUAL = NETWORKS["residual"]
BATCHES = list(RESIDUAL.inputs(24).split(4))
SCORES = fastscore.score(RESIDUAL.traced(), BATCHES, importance="magnitude-l2", progress=False)


@pytest.fixture(autouse=True)
def _every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each batch, however long it takes."""
    monkeypatch.setattr(run_file, "SHARE", float("inf"))


class Stopping:
    """Batches, of which one does not come in the reading after so many."""

    def __init__(self, readings: int, batches: int) -> None:
        self.readings, self.batches = readings, batches

    def __iter__(self) -> Iterator[Tensor]:
        self.readings -= 1
        for number, batch in enumerate(BATCHES):
            if self.readings < 0 and number == self.batches:
                raise KeyboardInterrupt
            yield batch


def repaired(batches: Any, resume: Path | None, method: Any = "linear", channels: float = 0.6,
             **options: Any) -> fastscore.PruneResult:
    model = RESIDUAL.traced()
    result = fastscore.prune(model, SCORES, BATCHES[0][:1], channels=channels)
    return fastscore.reconstruct(model, result, batches, method, resume=resume, **options)


def assert_same_bits(one: fastscore.PruneResult, other: fastscore.PruneResult) -> None:
    assert one.report.repairs == other.report.repairs
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_killed_twelve_times(tmp_path: Path) -> None:
    """SIGKILL, in a process of its own: at 6 random moments and at 6 in the middle of writing the file."""
    command = [sys.executable, "-m", "killed", str(tmp_path), "12", "0", "reconstruct"]
    said = json.loads(subprocess.check_output(command, env=environment(), cwd=tmp_path))
    assert len(said["stood at"]) == 12
    assert len(set(said["stood at"])) > 3
    assert said["ended at"] == 60
    assert said["same"]


@pytest.mark.parametrize("method", ["linear", "auto"])
def test_stopped_in_every_pass_and_gone_on_with_it_ends_with_the_same_bits(tmp_path: Path, method: Any) -> None:
    """In the passes over the dense network, 2 of them, and in those that follow, of which nothing is kept."""
    file = tmp_path / "run"
    for readings, batches in ((1, 2), (1, 4), (2, 1), (2, 5), (3, 3)):  # the first finds the example
        with pytest.raises(KeyboardInterrupt):
            repaired(Stopping(readings, batches), file, method)
    assert_same_bits(repaired(BATCHES, file, method), repaired(BATCHES, None, method))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """And another method goes on with the same moments."""
    calls: list[int] = []

    def counting(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return call_model(model, batch)

    whole = repaired(BATCHES, None, "mean", forward=counting)
    first = len(calls)
    calls.clear()
    assert_same_bits(repaired(BATCHES, tmp_path / "run", "mean", forward=counting), whole)
    assert len(calls) == first
    calls.clear()
    assert_same_bits(repaired(BATCHES, tmp_path / "run", "mean", forward=counting), whole)
    assert len(calls) == first - len(BATCHES)
    assert_same_bits(repaired(BATCHES, tmp_path / "run", forward=counting), repaired(BATCHES, None, forward=counting))


def test_another_run_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        repaired(Stopping(2, 1), file)
    with pytest.raises(ValueError, match=r"resume: .*run is of another run, which differs in removed;"):
        repaired(BATCHES, file, channels=0.7)
    with pytest.raises(ValueError, match=r"batches: the first 6 are not those in .*run, or not in that order"):
        repaired([*BATCHES[:4], BATCHES[5], BATCHES[4]], file)
    with pytest.raises(ValueError, match=r"batches: .*run has seen 6, and there are more"):
        repaired([*BATCHES, BATCHES[0]], file)
    with pytest.raises(ValueError, match=r"batches: .*run has seen 6, and there are 5"):
        repaired(BATCHES[:-1], file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="remove it to start over"):
        repaired(BATCHES, file)


def test_moments_of_other_inputs_are_not_taken() -> None:
    one, other = (Moments(torch.arange(4).reshape(shape)) for shape in ((1, 1, 4), (2, 1, 2)))
    with pytest.raises(ValueError, match="other inputs"):
        one.load_state_dict(other.state_dict())
