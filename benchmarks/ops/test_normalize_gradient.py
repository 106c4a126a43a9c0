"""normalize_gradient beside the same in eager PyTorch."""

import pytest
import torch

from benchmarks.ops.kernels import DTYPES
from fastscore import ops


def eager(g):
    norm = g.float().norm(dim=1, keepdim=True)
    return (g / norm).to(g.dtype), norm


@pytest.mark.parametrize("name", ["fastscore", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "classes"), [(8, 10), (64, 1000), (256, 32000)])
def test_normalize_gradient(measure, samples, classes, dtype, name):
    g = torch.randn(samples, classes).to(dtype)
    function = ops.normalize_gradient if name == "fastscore" else eager
    measure(f"normalise, {samples}x{classes} {dtype}", lambda: function(g), 2 * g.nbytes)
