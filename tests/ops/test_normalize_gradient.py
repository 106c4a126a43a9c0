"""normalize_gradient against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, LAYOUTS, SHAPES, normals, poisoned

from fastscore import ops
from fastscore.ops import reference

# The division is done in float64 and rounded once; sums in another order may move that by one place at most.
TOLERANCE = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-14}


def assert_close(g, eps=0.0):
    unit, norm = ops.normalize_gradient(g, eps)
    want_unit, want_norm = reference.normalize_gradient(g, eps)
    assert (unit.dtype, unit.shape, norm.dtype, norm.shape) == (
        want_unit.dtype, want_unit.shape, want_norm.dtype, want_norm.shape)
    tolerance = TOLERANCE[g.dtype]
    torch.testing.assert_close(unit, want_unit, rtol=tolerance, atol=0, equal_nan=True)
    torch.testing.assert_close(norm, want_norm, rtol=TOLERANCE[norm.dtype], atol=0, equal_nan=True)
    return unit, norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*dict.fromkeys(shape for shape, _ in SHAPES), (7,), (0,), (3, 1001)])
def test_layouts(shape, dtype):
    g = normals(shape, dtype, 0)
    for name, layout in LAYOUTS.items():
        if len(shape) > 1:
            assert_close(layout(g, 1))
        else:
            assert_close(poisoned(g, [0], gap=2, step=1 + (name == "every_other")))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_strides(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)))
    g = normals(shape, data.draw(st.sampled_from(DTYPES)), 1)
    view = poisoned(g, data.draw(st.permutations(range(len(shape)))), gap=data.draw(st.integers(0, 2)),
                    step=data.draw(st.integers(1, 3)))
    assert_close(view, eps=data.draw(st.sampled_from([0.0, 1.0])))


def test_repeated_values():
    g = normals((4, 1), torch.float32, 2).expand(4, 100)
    unit, _ = assert_close(g)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e18, 1e30, 3e37])
def test_neither_overflow_nor_underflow(scale):
    g = (normals((3, 50), torch.float64, 3) * scale).clamp(-3e38, 3e38).float()
    unit, norm = assert_close(g)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3), rtol=1e-6, atol=0)
    assert (norm > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_zero_stays_zero(dtype):
    g = normals((3, 20), dtype, 4)
    g[1] = 0
    for eps in (0.0, 1e-3):
        unit, norm = assert_close(g, eps)
        assert norm[1] == 0
        assert torch.equal(unit[1], torch.zeros(20, dtype=dtype))


def test_eps_is_the_least_divisor():
    g = torch.tensor([[3.0, 4.0], [0.003, 0.004]])
    unit, norm = ops.normalize_gradient(g, eps=0.01)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    torch.testing.assert_close(norm, torch.tensor([5.0, 0.005]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_sample(dtype):
    g = normals((4, 30), dtype, 5)
    g[1, 3], g[2, 4] = torch.nan, torch.inf
    unit, norm = assert_close(g)
    assert norm.isfinite().tolist() == [True, False, False, True]
    assert unit[1].isnan().all()  # NaN is not taken for a gradient of length 0
    assert unit[2].isnan().tolist() == [column == 4 for column in range(30)]  # ∞ / ∞
    assert unit[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [5e-324, 1e-310, 2.0**-1022, 1e300, float("inf")])
def test_a_floor_at_the_ends_of_float64(eps, dtype):
    g = normals((3, 20), dtype, 4)
    g[1] = 0
    unit, _ = assert_close(g, eps)
    assert torch.equal(unit[1], torch.zeros(20, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(dtype):
    """A divisor of exactly 1 (one element of 0 to 1 against a floor of 1) leaves every value as it was."""
    values = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.double() <= 1]
    unit, _ = ops.normalize_gradient(values[:, None], eps=1.0)
    assert torch.equal(unit[:, 0], values)
    exact = values.double() / 3
    third, _ = ops.normalize_gradient(values[:, None], eps=3.0)
    assert torch.equal(third[:, 0], exact.to(dtype))


def test_keeps_the_layout():
    g = normals((2, 3, 4, 5), torch.float32, 6).to(memory_format=torch.channels_last)
    assert ops.normalize_gradient(g)[0].is_contiguous(memory_format=torch.channels_last)
