"""A folder that happens to be called fastscore, a clone say, is never imported in place of the library."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fastscore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone called fastscore, installed as `pip install -e` does it into `environment` beside it.

    Its kernels are those already built, so it has no setup.py, whose one task is to build them.
    """
    folder = tmp_path_factory.mktemp("work")
    made = folder / "fastscore"
    shutil.copytree(Path(fastscore.__file__).parent, made / "fastscore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, made)
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    # after all that is installed there
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "environment")}))
    (site / "zz_present.pth").write_text("\n".join(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-build-isolation",
        "--no-deps", "--disable-pip-version-check", "-e", made)
    return made


def run(folder: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, cwd=folder, env={**environment, "FASTSCORE_CUDA": "0"}, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_beside_a_clone_the_library_is_imported(clone: Path) -> None:
    (clone.parent / "script.py").write_text(
        "from importlib.util import find_spec; print(find_spec('fastscore').origin)")
    python = clone.parent / "environment" / "bin" / "python"
    assert run(clone.parent, python, "script.py") == f"{clone / 'fastscore' / '__init__.py'}\n"
    assert run(clone.parent, python, "-m", "fastscore", "--version") == f"fastscore {fastscore.__version__}\n"
