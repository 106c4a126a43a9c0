"""What setup.py makes of FASTSCORE_CUDA and FASTSCORE_CUDA_TARGETS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("choice", "message"), [
    ({"FASTSCORE_CUDA": "1"}, "nvcc is neither in CUDA_HOME/bin nor on the PATH"),
    ({"FASTSCORE_CUDA": "yes"}, "set it to 1 (with CUDA kernels), 0 (without) or not at all"),
    ({"FASTSCORE_CUDA_TARGETS": "8.0 90"}, "'8.0 90': name some of 80 90 100 120, with spaces between"),
])
def test_a_build_that_cannot_be_had_says_why(tmp_path: Path, choice: dict[str, str], message: str) -> None:
    """Before anything is compiled: on a PATH with Python alone."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("CUDA_", "FASTSCORE_CUDA"))}
    environment |= {**choice, "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.o"))
