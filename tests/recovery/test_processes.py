"""Repairs by processes that share the work: the same for one, two and four of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from started import environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worked(tmp_path_factory.mktemp("repair"), 4, "repair")


def worked(folder: Path, size: int, job: str) -> Path:
    """The folder, with what so many processes have put there."""
    command = [sys.executable, "-m", "workers", str(folder), str(size), job]
    said = subprocess.check_output(command, cwd=folder, text=True, env=environment())
    assert said.strip() == str([0] * size), "\n".join((folder / f"err {rank}").read_text() for rank in range(size))
    return folder


@pytest.mark.parametrize("name", ["linear", "asymmetric", "auto"])
def test_one_two_and_four_processes_repair_alike(folder: Path, name: str) -> None:
    rows, state = torch.load(folder / f"{name} 1 0")
    for size in (2, 4):
        for rank in range(size):
            found_rows, found = torch.load(folder / f"{name} {size} {rank}")
            for row, expected in zip(found_rows, rows, strict=True):
                assert (row[:2], row[4]) == (expected[:2], expected[4])
                assert row[2:4] == pytest.approx(expected[2:4], rel=1e-6)
            assert_same(found, state)


@pytest.mark.parametrize("name", ["recalibrated", "sometimes"])
def test_one_two_and_four_processes_recalibrate_alike(folder: Path, name: str) -> None:
    """Also a norm that does not run in all batches."""
    for size in (2, 4):
        for rank in range(size):
            assert_same(torch.load(folder / f"{name} {size} {rank}"), torch.load(folder / f"{name} 1 0"))


def test_each_process_goes_on_with_the_moments_of_its_own(folder: Path) -> None:
    assert {path.name for path in folder.glob("moments*")} == {"moments.0-of-2", "moments.1-of-2"}
    for rank in range(2):
        for name in ("kept", "gone on"):
            assert_same(torch.load(folder / f"{name} {rank}"), torch.load(folder / "linear 1 0")[1])


def test_a_width_at_which_the_model_runs_in_one_process_alone_is_left_out_in_all(tmp_path: Path) -> None:
    folder = worked(tmp_path, 2, "fastidious")
    alone = torch.load(folder / "fastidious 1 0")
    for rank in range(2):
        assert_same(torch.load(folder / f"fastidious 2 {rank}"), alone)
        assert_same(torch.load(folder / f"fastidious state 2 {rank}"), torch.load(folder / "fastidious state 1 0"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-8, msg=key)
