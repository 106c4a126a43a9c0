"""The CUDA bodies under ThreadSanitizer: silent as they are, loud once a barrier is taken out.

The second is tried with FASTSCORE_NIGHTLY=1: each barrier takes a build.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from shim import KERNELS, compile_driver

NIGHTLY = "FASTSCORE_NIGHTLY" in os.environ
BARRIER = "__syncthreads();"


def run(folder: Path, kernels: Path = KERNELS) -> subprocess.CompletedProcess[str]:
    """Builds race.cpp with the kernels of a folder and runs it."""
    program = compile_driver(folder / "race", "-fsanitize=thread", "-O0", "-g1", source="race.cpp", kernels=kernels)
    return subprocess.run([program], capture_output=True, text=True, env={"TSAN_OPTIONS": "exitcode=66"})


def test_no_thread_reads_what_another_may_still_write(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(done.stdout.splitlines()) == 8


@pytest.mark.skipif(not NIGHTLY, reason="half a minute each")
@pytest.mark.parametrize("name", ["channel_sums.cuh", "elements.cuh", "rows.cuh"])
def test_a_missing_barrier_is_caught(tmp_path: Path, name: str) -> None:
    kernels = tmp_path / "csrc" / "cuda"
    shutil.copytree(KERNELS, kernels)
    for header in KERNELS.parent.glob("*.h"):
        shutil.copy(header, kernels.parent)
    source = (kernels / name).read_text()
    assert source.count(BARRIER) == 1
    (kernels / name).write_text(source.replace(BARRIER, ""))
    done = run(tmp_path, kernels)
    assert done.returncode == 66
    assert "data race" in done.stderr
