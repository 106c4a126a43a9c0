"""channel_dot, channel_sums and channel_powers beside eager, einsum, torch.compile and torch.dot."""

import pytest
import torch

from benchmarks.ops import kernels
from fastscore import ops

NAMES = ("torch.dot", "dot", "sums", "powers", "eager", "einsum", "compiled", "compiled einsum")


@pytest.fixture(scope="module")
def functions():
    """case -> (its functions, the bytes they read), made one case at a time."""
    made = {}

    def of(case):
        if case not in made:
            made.clear()
            a, g = case.tensors()
            made[case] = kernels.candidates(a, g), kernels.bytes_read(a, g)
        return made[case]
    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: case.name)
def test_sums_over_positions(measure, functions, case, name):
    by_name, size = functions(case)
    measure(f"channel sums, {case.name}", by_name[name], size)


@pytest.mark.parametrize("op", ["channel_dot", "channel_sums", "channel_powers"])
@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (8, 64, 7, 7)], ids=str)
def test_small_calls(measure, shape, op):
    a, g = torch.randn(shape), torch.randn(shape)
    function = getattr(ops, op)
    measure(f"small calls, {shape}", lambda: function(a, g), kernels.bytes_read(a, g))


@pytest.mark.parametrize("layout_g", ["channels_last", "repeated", "contiguous"])
def test_mixed_layouts(measure, layout_g):
    a = torch.randn(16, 256, 28, 28)
    g = {"contiguous": a.cos(), "channels_last": a.cos().to(memory_format=torch.channels_last),
         "repeated": a.mean((2, 3), keepdim=True).expand_as(a)}[layout_g]
    read = kernels.bytes_read(a) + (0 if layout_g == "repeated" else kernels.bytes_read(g))
    measure("contiguous activation, gradient of another layout", lambda: ops.channel_dot(a, g), read)
