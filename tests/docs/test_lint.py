"""What `make lint type` runs, run here too, so that one command tests everything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def recipes(*targets: str) -> list[str]:
    """The commands of the Makefile's targets."""
    text = (ROOT / "Makefile").read_text()
    found = [re.search(rf"^{target}:\n((?:\t.+\n)+)", text, re.MULTILINE) for target in targets]
    assert all(found), targets
    return [line.strip().replace("$(PYTHON)", sys.executable) for match in found for line in match[1].splitlines()]


@pytest.mark.parametrize("command", recipes("lint", "type"))
def test_nothing_is_found(command: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    result = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
