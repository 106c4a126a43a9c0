"""The code in the pages of the documentation."""

import re
from pathlib import Path
from typing import Any


def blocks(page: Path, language: str = "python") -> list[str]:
    """Those of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of Python one after the other; the names that there are then."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    return names
