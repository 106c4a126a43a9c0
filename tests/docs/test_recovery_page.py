"""What docs/recovery.md shows is what happens."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "recovery.md"


def test_its_python_runs() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    report = names["result"].report  # type: ignore[attr-defined]
    assert report.macs[1] <= 0.7 * report.macs[0]
    assert {"none", "mean", "linear", "asymmetric"} == {row.name for row in report.repairs}
    assert [row.name for row in names["repaired"].report.repairs] == ["none", *["linear"] * 3]  # type: ignore[attr-defined]
