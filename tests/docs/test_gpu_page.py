"""docs/gpu.md: its blocks follow one another; here on a CPU, where the reference stands in for Triton."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


def test_its_python_runs_block_after_block() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[0].replace('"cuda"', '"cpu"').replace('"triton"', '"reference"'), names)
    expected = (names["a"] * names["g"]).sum((2, 3))
    torch.testing.assert_close(names["sums"], expected, rtol=1e-4, atol=1e-3)
    assert len(blocks) == 2
    warm = blocks[1].splitlines()[0]  # the rest captures a CUDA graph
    exec(warm, names)
    torch.testing.assert_close(names["sums"], expected, rtol=1e-4, atol=1e-3)
