"""Work shared by real processes: each sees a part of the samples, and all end with the scores of the whole."""

import json
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from started import environment
from torch import distributed
from workers import FOUND, IMAGES, RESIDUAL, WAYS, WORKERS, drop_in, made_smaller
from working_folder import write_photos

import fastscore
from fastscore import cli
from fastscore.cli.processes import ProcessLostError, group, own_device, rank_and_world_size
from fastscore.scoring.options import Persistence


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    codes = exit_codes(folder, WORKERS, "work")
    assert codes == [0] * WORKERS, "\n".join((folder / f"err {rank}").read_text() for rank in range(WORKERS))
    return folder


def assert_close(found: fastscore.Scores, whole: fastscore.Scores) -> None:
    """Equal to rounding: sums of the same float64 numbers in another order."""
    assert (found.samples, found.passes, found.origin) == (whole.samples, whole.passes, whole.origin)
    for kind in ("totals", "means"):
        for layer, total in getattr(whole, kind).items():
            torch.testing.assert_close(getattr(found, kind)[layer], total, rtol=1e-12, atol=1e-15)


def assert_same_bits(found: fastscore.Scores, whole: fastscore.Scores) -> None:
    for kind in ("totals", "means", "half_totals"):
        assert all(torch.equal(getattr(found, kind)[layer], total) for layer, total in getattr(whole, kind).items())
    assert (found.samples, found.passes, found.half_passes) == (whole.samples, whole.passes, whole.half_passes)


@pytest.mark.parametrize(("way", "fixed"), FOUND)
def test_one_two_and_four_processes_give_the_same_scores(results: Path, way: str, fixed: bool) -> None:
    whole = fastscore.score(RESIDUAL.traced(), IMAGES.split(3), progress=False, **WAYS[way])
    in_order = fastscore.score(RESIDUAL.traced(), IMAGES.split(3), progress=False, fixed_order=True, **WAYS[way])
    assert_close(in_order, whole)
    for size in (1, 2, 4):
        for rank in range(size):
            found = fastscore.Scores.load(results / f"{way} {size} {fixed} {rank}")
            assert_same_bits(found, in_order) if fixed else assert_close(found, whole)


@pytest.mark.parametrize("name", ["three batches", "gone on"])
def test_a_process_without_data_and_runs_that_go_on(results: Path, name: str) -> None:
    batches = IMAGES.split(3)[:3 if name == "three batches" else None]
    whole = fastscore.score(RESIDUAL.traced(), batches, progress=False, fixed_order=True)
    for size in (1, 2, 4):
        for rank in range(size):
            assert_same_bits(fastscore.Scores.load(results / f"{name} {size} {rank}"), whole)
    kept = {path.name for path in results.glob("*.ckpt*")}
    # the fourth of four had no batch at first, and one at last
    assert kept == {"1.ckpt", *(f"{size}.ckpt.{rank}-of-{size}" for size in (2, 4) for rank in range(size))}


def test_another_number_of_processes_does_not_go_on(results: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: 4\.ckpt\.0-of-4 was written by another number of processes"):
        fastscore.score(RESIDUAL.traced(), IMAGES.split(3), resume=results / "4.ckpt", progress=False)


def test_processes_that_do_not_agree_all_say_so(results: Path) -> None:
    for rank in range(WORKERS):
        said = (results / f"another seed {rank}").read_text()
        assert said.startswith("process_group: process 2 differs from process 0 in seed;")
        said = (results / f"other weights {rank}").read_text()
        assert said.startswith("process_group: process 1 differs from process 0 in weights;")


def test_all_reduce_of_scorers(results: Path) -> None:
    model = RESIDUAL.model()
    whole = fastscore.Scorer(model, IMAGES, gradient="random", seed=3)
    x = torch.cat([IMAGES[rank:9:WORKERS] for rank in range(3)])
    with whole:
        whole.probe(model(x))
    for rank in range(WORKERS):
        assert_close(fastscore.Scores.load(results / f"all_reduce {rank}"), whole.scores())


def test_distributed_data_parallel(results: Path) -> None:
    """Layers have the names that they have without the wrapper."""
    whole = drop_in(RESIDUAL.traced(), IMAGES[:8]).scores()
    scored = fastscore.score(RESIDUAL.traced(), IMAGES.split(3), progress=False)
    for rank in range(WORKERS):
        assert_close(fastscore.Scores.load(results / f"DDP {rank}"), whole)
        assert_close(fastscore.Scores.load(results / f"DDP, score {rank}"), scored)


def test_a_model_in_distributed_data_parallel_becomes_what_it_does_without(results: Path) -> None:
    """By prune(), mask() and prune_iteratively(), with steps of training in common; no name is of the wrapper."""
    whole = made_smaller(RESIDUAL.model())
    for rank in range(WORKERS):
        found = torch.load(results / f"DDP, smaller {rank}")
        assert found.keys() == whole.keys()
        for what, expected in whole.items():
            assert found[what].keys() == expected.keys(), what
            for name, value in expected.items():
                torch.testing.assert_close(found[what][name], value, rtol=1e-9, atol=1e-12, msg=f"{what}: {name}")


def test_fully_sharded(results: Path) -> None:
    """In the training loop as ever; what needs a copy says how to have one."""
    whole = drop_in(RESIDUAL.traced(), IMAGES[:8]).scores()
    probed = fastscore.Scorer(model := RESIDUAL.traced(), IMAGES, gradient="random", seed=3)
    with probed:
        output = model(IMAGES[:8])
        probed.probe(output)
        probed.probe(output)
    for rank in range(WORKERS):
        assert_close(fastscore.Scores.load(results / f"FSDP2 {rank}"), whole)
        assert_close(fastscore.Scores.load(results / f"FSDP2, probes {rank}"), probed.scores())
        for name in ("score", "Scorer"):
            said = (results / f"FSDP2, {name} {rank}").read_text()
            assert said.startswith("model: the parameters of ")
            assert "get_model_state_dict" in said


def test_what_makes_no_sense_with_several() -> None:
    for options in ({"fixed_order": True}, {"process_group": object()}):
        with pytest.raises(ValueError, match=r"samples=.auto. looks after each batch"):
            fastscore.score(RESIDUAL.traced(), IMAGES.split(3), samples="auto", progress=False, **options)
        with pytest.raises(ValueError, match="magnitude-l2 reads the weights alone"):
            fastscore.score(RESIDUAL.traced(), IMAGES.split(3), importance="magnitude-l2", progress=False, **options)


def test_more_processes_than_the_fixed_order_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        def size(self) -> int:
            return 65

    monkeypatch.setattr(distributed, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match="fixed_order: it is for up to 64 processes, and these are 65"):
        Persistence(process_group=Many(), fixed_order=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "size", "expected"), [(None, None, (0, 1)), ("1", "4", (1, 4)), ("0", "1", (0, 1))])
def test_the_place_that_a_launcher_gives(monkeypatch: pytest.MonkeyPatch, rank: str | None, size: str | None,
                                         expected: tuple[int, int]) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert rank_and_world_size() == expected


@pytest.mark.parametrize(("rank", "size"), [("1", None), (None, "2"), ("2", "2"), ("-1", "2"), ("one", "2")])
def test_a_place_that_is_none(monkeypatch: pytest.MonkeyPatch, rank: str | None, size: str | None) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start the processes with torchrun, or unset both"):
        rank_and_world_size()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda:3")
    assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert own_device(torch.device("cpu")) == torch.device("cpu")


NETS = """
import os, signal
import torch
from torch import nn

class Net(nn.Sequential):
    calls = 0

    def forward(self, x):
        if os.environ.get("RANK") == "1" and len(x) == 4 and torch.is_grad_enabled():  # scoring; tracing takes fewer
            Net.calls += 1
            if Net.calls == 2:
                print("dying", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def build():
    return Net(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """nets.py, whose second process dies in its second batch, and 17 images."""
    (tmp_path / "nets.py").write_text(NETS)
    pixels = torch.randint(256, (17, 12, 12, 3), generator=torch.Generator().manual_seed(0)).byte()
    write_photos(tmp_path / "photos", pixels)
    return tmp_path


SCORE = ["score", "nets.py:build", "--images", "photos", "--size", "12", "--out", "s.safetensors", "--fixed-order"]


def exit_codes(folder: Path, size: int, *job: str) -> list[int]:
    """Of processes that do a job together: see workers.py."""
    said = subprocess.check_output([sys.executable, "-m", "workers", str(folder), str(size), *job], cwd=folder,
                                   env=environment(), timeout=300)
    codes: list[int] = json.loads(said)
    return codes


def test_a_process_that_dies_ends_the_others(folder: Path) -> None:
    codes = exit_codes(folder, 2, "fastscore", *SCORE, "--batch-size", "4")
    assert codes == [1, -signal.SIGKILL]
    assert (folder / "out 1").read_text() == "dying\n"
    assert (folder / "err 0").read_text().splitlines()[-1].startswith("fastscore: error: another process has ended")
    assert (folder / "out 0").read_text() == ""
    assert not (folder / "s.safetensors").exists()


def test_a_process_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    codes = exit_codes(tmp_path, 2, "silent")
    assert codes[0] == 1
    said = (tmp_path / "err 0").read_text()
    assert said.startswith("another process has ended, or has not answered within 0:00:03; what it said is the reason")


def test_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes print and write what one does, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "fastscore", *SCORE, "--batch-size", "3", "--json"]
    said = json.loads(subprocess.check_output(command, cwd=folder, env=environment(), timeout=300))
    assert said["samples"] == 17
    shared = fastscore.Scores.load(folder / "s.safetensors")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    assert cli.main([*SCORE, "--batch-size", "3"]) == 0
    assert_same_bits(fastscore.Scores.load("s.safetensors"), shared)


def test_an_error_of_its_own_is_not_taken_for_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="mine") as caught, group(torch.device("cpu"), timedelta(seconds=1)):
        raise RuntimeError("mine")
    assert not isinstance(caught.value, ProcessLostError)
