"""Runs tests/ops/triton_interpreter in the process of its own that Triton's interpreter needs."""

import subprocess
import sys
from pathlib import Path

import pytest
from started import environment

FOLDER = Path(__file__).parent / "triton_interpreter"
FAMILIES = ("channel_sums", "clamp_backward", "random_gradient", "normalize_gradient", "ops")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               *(str(FOLDER / f"test_interpreted_{family}.py") for family in FAMILIES)]
    result = subprocess.run(command, env=environment(TRITON_INTERPRET="1"), cwd=FOLDER.parents[2],
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
