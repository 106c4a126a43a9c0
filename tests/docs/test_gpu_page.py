"""docs/gpu.md: its blocks follow one another; here on a CPU, where the reference stands in for Triton."""

from pathlib import Path
from typing import Any

import torch
from pages import blocks

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def test_its_python_runs_block_after_block() -> None:
    first, second = blocks(PAGE)
    names: dict[str, Any] = {}
    exec(first.replace('"cuda"', '"cpu"').replace('"triton"', '"reference"'), names)
    expected = (names["a"] * names["g"]).sum((2, 3))
    torch.testing.assert_close(names["sums"], expected, rtol=1e-4, atol=1e-3)
    warm = second.splitlines()[0]  # the rest captures a CUDA graph
    exec(warm, names)
    torch.testing.assert_close(names["sums"], expected, rtol=1e-4, atol=1e-3)
