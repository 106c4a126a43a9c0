"""distill() stopped and gone on with, and shared by real processes."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decisive import same, state
from distilling import IMAGES, WORKERS, dense, every_pair, smaller
from started import environment
from torch.utils.data import DataLoader, TensorDataset

from fastscore.recovery.distillation import distill
from fastscore.recovery.distillation_run import DistillationReport

QUIET: dict[str, Any] = {"progress": False}


class Stopping:
    """A shuffling loader that ends in an interrupt after so many batches."""

    def __init__(self, after: int) -> None:
        self.loader, self.left = DataLoader(TensorDataset(IMAGES), 16, shuffle=True), after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"precision": "float16", "patience": None}])
def test_stopped_anywhere_and_gone_on_with_it_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"steps": 20, "looks": 5, "lr": 0.01, **options, **QUIET}
    whole = smaller()
    report = distill(dense(), whole, Stopping(-1), **options)
    file = tmp_path / "run"
    for after in (6, 9, 13, 17, 18):  # the first reading, for the samples held out, counts too
        network = smaller()
        before = state(network)
        with pytest.raises(KeyboardInterrupt):
            distill(dense(), network, Stopping(after), resume=file, **options)
        assert same(state(network), before)
    network = smaller()
    assert distill(dense(), network, Stopping(-1), resume=file, **options) == report
    assert same(state(network), state(whole))
    again = smaller()
    assert distill(dense(), again, Stopping(-1), resume=file, **options) == report  # nothing is left to do
    assert same(state(again), state(whole))


def test_a_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    file, options = tmp_path / "run", {"steps": 4, "looks": 2, **QUIET}
    distill(dense(), smaller(), IMAGES.split(16), resume=file, **options)
    for change, named in (({"lr": 0.5}, "lr"), ({"seed": 1}, "seed"), ({"temperature": 1.0}, "temperature"),
                          ({"steps": 5}, "steps"), ({"loss": torch.nn.functional.mse_loss}, "loss")):
        with pytest.raises(ValueError, match=rf"resume: .*run is of another run, which differs in {named};"):
            distill(dense(), smaller(), IMAGES.split(16), resume=file, **{**options, **change})
    with pytest.raises(ValueError, match="differs in dense weights;"):
        distill(smaller(), smaller(), IMAGES.split(16), resume=file, **options)
    with pytest.raises(ValueError, match="differs in weights;"):
        distill(dense(), dense(), IMAGES.split(16), resume=file, **options)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="remove it to start over"):
        distill(dense(), smaller(), IMAGES.split(16), resume=file, **options)


def test_other_batches_are_told(tmp_path: Path) -> None:
    file, options = tmp_path / "run", {"steps": 6, "looks": 3, "held_out": [IMAGES[:8]], **QUIET}
    with pytest.raises(FloatingPointError, match="by step 4"):
        distill(dense(), smaller(), [IMAGES[8:24], IMAGES[24:40], IMAGES[40:56], IMAGES[56:] * torch.nan], resume=file,
                **options)
    changed = [IMAGES[8:24], IMAGES[24:40] + 1, IMAGES[40:56]]
    with pytest.raises(ValueError, match="batches: the first 2 of epoch 1 are not those that the run was trained on"):
        distill(dense(), smaller(), changed, resume=file, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilling")
    done = subprocess.run([sys.executable, "-m", "workers", folder, str(WORKERS), "distill"], capture_output=True,
                          text=True, check=True, env=environment())
    errors = "\n".join((folder / f"err {rank}").read_text() for rank in range(WORKERS))
    assert json.loads(done.stdout) == [0] * WORKERS, errors
    return folder


@pytest.mark.parametrize("way", ["group", "resumed", "DDP"])
def test_several_processes_learn_as_one_with_larger_batches(results: Path, way: str) -> None:
    """Without BatchNorm, whose statistics are those of each process's batch."""
    one = smaller(norms=False)
    report = distill(dense(norms=False), one, every_pair(), **{**QUIET, "steps": 12, "looks": 3,
                                                               "held_out": [IMAGES[:32]]})
    for rank in range(WORKERS):
        found = torch.load(results / f"{way} {rank}")
        for name, value in state(one).items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=1e-6)
        looks = DistillationReport(**found["report"]).looks
        assert [look["step"] for look in looks] == [0, 4, 8, 12]  # type: ignore[index]
        for look, expected in zip(looks, report.looks, strict=True):
            assert look["kl"] == pytest.approx(expected.kl, rel=1e-3)  # type: ignore[index]
            assert look["loss"] == pytest.approx(expected.loss, rel=1e-3)  # type: ignore[index]


def test_batchnorm_statistics_are_alike_in_every_process(results: Path) -> None:
    first, second = (torch.load(results / f"norms {rank}")["state"] for rank in range(WORKERS))
    assert same(first, second)
    assert not same(first, state(smaller()))


def test_nothing_is_left_in_the_networks() -> None:
    network = smaller()
    teacher = dense()
    untouched = copy.deepcopy(teacher)
    distill(teacher, network, IMAGES.split(16), steps=2, features=["3"], **QUIET)
    assert same(state(teacher), state(untouched))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*teacher.modules(),
                                                                                     *network.modules()))
