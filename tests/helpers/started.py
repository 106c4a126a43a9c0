"""What processes of Python that tests start are given."""

import os
from pathlib import Path

HELPERS = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """That of this process, and what tests share on the path, but no timm; one thread for each."""
    path = [HELPERS / "without_timm", HELPERS.parents[1], HELPERS, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), **more}
