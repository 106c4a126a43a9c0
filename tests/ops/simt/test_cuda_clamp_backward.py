"""csrc/cuda/clamp_backward.cuh against the reference, element by element and byte by byte."""

import pytest
import torch
from shim import DTYPES, LAYOUTS, Shim
from simt_cases import CHANNELS_LAST, place
from torch import Tensor

from fastscore.ops import reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 2e-15}
BOUNDS = [(0.0, float("inf")), (0.0, 6.0), (-0.3, 0.7)]
CASES = {  # shape, order in memory, elements that it starts late, multiprocessors
    "rows": ((2, 3, 14, 14), None, 0, 1),
    "odd rows": ((3, 5, 7, 7), None, 0, 1),
    "rows, one element late": ((2, 3, 9, 9), None, 1, 1),
    "rows, split": ((1, 2, 128, 161), None, 0, 8),
    "columns": ((3, 16, 7, 7), CHANNELS_LAST, 0, 1),
    "columns, ragged": ((2, 7, 5, 5), CHANNELS_LAST, 0, 1),
    "columns, one element late": ((2, 16, 5, 5), CHANNELS_LAST, 1, 1),
    "columns, split": ((1, 24, 40, 41), CHANNELS_LAST, 0, 8),
    "columns, ragged, split": ((1, 3, 40, 41), CHANNELS_LAST, 0, 8),
    "features": ((5, 48), None, 0, 1),
    "no positions": ((2, 3, 0), None, 0, 1),
    "no samples": ((0, 3, 4), None, 0, 1),
}


def check(shim: Shim, y: Tensor, g: Tensor, rest: Tensor | None, bounds: tuple[float, float], units: int = 1,
          mean: bool = False) -> None:
    want = reference.clamp_backward(y, g, rest, *bounds)[0]
    exact = reference.channel_sums(y.double(), g.double(), 1, mean)
    sizes = reference.channel_sums(y.double().abs(), g.double().abs(), 1, mean)
    written = g.untyped_storage().nbytes() // g.element_size()
    around = torch.ones(written, dtype=torch.bool)
    around.as_strided(g.shape, g.stride(), g.storage_offset())[...] = False
    sums = shim.clamp_backward(y, g, rest, *bounds, units=units, mean=mean)
    assert torch.equal(g, want)
    assert g.new_empty(0).set_(g.untyped_storage())[around].isnan().all(), "written outside"
    for got, to_be, size in zip(sums, exact, sizes, strict=True):
        assert ((got.double() - to_be).abs() <= TOLERANCE[y.dtype] * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_layout(shim: Shim, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape, order, offset, units = CASES[name]
    for number, (bounds, with_rest) in enumerate(zip(BOUNDS, (False, True, True), strict=True)):
        y, g, rest = (place(shape, dtype, order, offset) for _ in range(3))
        y.copy_(y.clamp(*bounds))
        if y.numel():
            geometry = shim.geometry(y, g, units=units)
            assert LAYOUTS[geometry.layout] == ("rows" if name.startswith(("rows", "odd")) else "columns")
            assert (geometry.split.splits > 1) == name.endswith("split")
        check(shim, y, g, rest if with_rest else None, bounds, units, mean=number % 2 == 0)


@pytest.mark.parametrize("order", [None, CHANNELS_LAST], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_start_elsewhere(shim: Shim, order: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """Each of the three tensors in turn starts between 16-byte boundaries."""
    torch.manual_seed(1)
    for late in range(3):
        y, g, rest = (place((2, 16, 6, 6), dtype, order, int(number == late)) for number in range(3))
        check(shim, y.copy_(y.relu()), g, rest, BOUNDS[0])


@pytest.mark.parametrize("order", [None, CHANNELS_LAST], ids=["rows", "columns"])
def test_read_16_bytes_at_a_time(shim: Shim, order: tuple[int, ...] | None) -> None:
    y, g, rest = (place((2, 64, 8, 8), torch.bfloat16, order) for _ in range(3))
    shim.clamp_backward(y, g, rest, 0.0, 6.0)
    assert (shim.reads.packed_bytes, shim.reads.single_bytes) == (3 * y.nbytes, 0)


def test_the_bounds_are_those_of_the_dtype(shim: Shim) -> None:
    """0.7 is no bfloat16: what the clamp wrote is the one next to it, and lets nothing through."""
    y = torch.full((1, 1, 4), 0.7, dtype=torch.bfloat16)
    g = torch.ones_like(y)
    shim.clamp_backward(y, g, None, -0.3, 0.7)
    assert g.tolist() == [[[0, 0, 0, 0]]]


def test_not_a_number_and_infinity(shim: Shim) -> None:
    y = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5]]])
    g = torch.ones_like(y)
    shim.clamp_backward(y, g, None, 0.0, float("inf"))
    assert g.tolist() == [[[1, 0, 0, 0, 0, 1]]]
