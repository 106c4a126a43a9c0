"""What setup.py makes of FASTSCORE_CUDA and FASTSCORE_CUDA_TARGETS."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[3]



def test_a_build_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    """Before anything is compiled: on a PATH with Python alone."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("CUDA_", "FASTSCORE_CUDA"))}
    environment |= {"FASTSCORE_CUDA": "1", "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nvcc is neither in CUDA_HOME/bin nor on the PATH" in done.stderr
    assert not list(tmp_path.rglob("*.o"))


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("FASTSCORE_CUDA", "yes", "set it to 1 (with CUDA kernels), 0 (without) or not at all"),
    ("FASTSCORE_CUDA_TARGETS", "8.0 90", "'8.0 90': name some of 80 90 100 120, with spaces between"),
])
def test_a_choice_that_is_none_ends_the_build(monkeypatch: pytest.MonkeyPatch, variable: str, value: str,
                                              message: str) -> None:
    """Both are asked for before a source file is looked at: build_extensions() of the same class, without a process."""
    options: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", options.update)
    runpy.run_path("setup.py")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        options["cmdclass"]["build_ext"].build_extensions(None)
