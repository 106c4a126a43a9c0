"""csrc/cuda/normalize_gradient.cuh against the reference."""

import pytest
import torch
from shim import DTYPES, Shim
from simt_cases import CHANNELS_LAST, place
from torch import Tensor

from fastscore.ops import reference

# Rounding of the result, twice as an intermediate float32 is rounded as well.
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-15, torch.float16: 1.1e-3, torch.bfloat16: 8e-3}
SMALLEST = {torch.float16: 6e-8}  # below its normal range, float16 rounds to multiples of this


def assert_close(shim: Shim, g: Tensor, eps: float = 0.0, units: int = 1) -> int:
    """Compares with the reference; the number of passes that the kernels made over g."""
    unit, norm, passes = shim.normalize_gradient(g, eps, units)
    expected_unit, expected_norm = reference.normalize_gradient(g.double(), eps)
    assert norm.dtype == reference.result_dtype(g.dtype)
    torch.testing.assert_close(norm.double(), expected_norm, rtol=TOLERANCE[norm.dtype], atol=0)
    torch.testing.assert_close(unit.double(), expected_unit, rtol=TOLERANCE[g.dtype], atol=SMALLEST.get(g.dtype, 1e-40))
    return passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 10, 100, 1000, 1001, 4093])
def test_logits_are_read_once(shim: Shim, classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert assert_close(shim, place((5, classes), dtype)) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [1, 8])
def test_long_samples_are_read_twice(shim: Shim, units: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    assert assert_close(shim, place((2, 3, 75, 111), dtype), units=units) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["channels_last", "column", "expanded", "cropped", "late", "padded", "vector", "empty",
                                  "no elements"])
def test_strides(shim: Shim, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    g = {
        "channels_last": lambda: place((3, 8, 5, 6), dtype, CHANNELS_LAST),
        "column": lambda: place((7, 30), dtype, (1, 0)),
        "expanded": lambda: place((4, 1, 5), dtype).expand(4, 6, 5),
        "cropped": lambda: place((4, 6, 9), dtype)[:, 1:-1, 2:],
        "late": lambda: place((3, 50), dtype, offset=1),
        "padded": lambda: place((5, 70), dtype)[:, :64],
        "vector": lambda: place((6,), dtype),
        "empty": lambda: place((0, 5), dtype),
        "no elements": lambda: place((3, 0), dtype),
    }[name]()
    assert_close(shim, g)


@pytest.mark.parametrize("shape", [(2, 40), (2, 20000)], ids=str)
def test_lengths_beyond_the_range_of_float32_squares(shim: Shim, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    for scale in (1e-30, 1e30):
        assert_close(shim, torch.randn(shape) * scale)


@pytest.mark.parametrize("columns", [10, 20000])
def test_zero_stays_zero_and_what_is_not_finite_comes_through(shim: Shim, columns: int) -> None:
    g = torch.full((5, columns), 0.5)
    g[0], g[1, 3], g[2], g[3, 4] = 0, torch.nan, 1e-8, torch.inf
    for eps in (0.0, 5e-324, 1e-3):
        unit, norm, _ = shim.normalize_gradient(g, eps)
        expected_unit, expected_norm = reference.normalize_gradient(g, eps)
        torch.testing.assert_close(unit, expected_unit, equal_nan=True)
        torch.testing.assert_close(norm, expected_norm, equal_nan=True)
