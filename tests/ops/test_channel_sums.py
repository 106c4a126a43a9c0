"""channel_sums, channel_dot and channel_powers against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    CHAIN,
    DTYPES,
    LAYOUTS,
    SHAPES,
    UNIT,
    expanded,
    expansions,
    integers,
    layout_pairs,
    normals,
    poisoned,
)
from torch import Tensor

from fastscore import ops
from fastscore.ops import reference

OPS = ("channel_sums", "channel_dot", "channel_powers")


def results(op: str, a: Tensor, g: Tensor, channel_dim: int, module: object = ops) -> tuple[Tensor, ...]:
    out = getattr(module, op)(a, g, channel_dim)
    return out if isinstance(out, tuple) else (out,)


def of_reference(a: Tensor, g: Tensor, channel_dim: int) -> dict[str, tuple[Tensor, ...]]:
    return {op: results(op, a, g, channel_dim, reference) for op in OPS}


def assert_equal(expected: dict[str, tuple[Tensor, ...]], a: Tensor, g: Tensor, channel_dim: int,
                 context: object) -> None:
    for op, wants in expected.items():
        for k, (got, want) in enumerate(zip(results(op, a, g, channel_dim), wants, strict=True)):
            assert got.dtype == want.dtype, (op, k, context)
            assert got.is_contiguous(), (op, k, context)
            assert torch.equal(got, want), (op, k, context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_every_pair_of_layouts_reads_each_element_once(shape, channel_dim, dtype):
    a, g = integers(shape, dtype, 0), integers(shape, dtype, 1)
    expected = of_reference(a, g, channel_dim)
    for layout_a, layout_g in layout_pairs():
        assert_equal(expected, LAYOUTS[layout_a](a, channel_dim), LAYOUTS[layout_g](g, channel_dim), channel_dim,
                     (layout_a, layout_g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_repeated_values(shape, channel_dim, dtype):
    a, g = integers(shape, dtype, 0), integers(shape, dtype, 1)
    for dims in expansions(shape, channel_dim):
        narrow = expanded(g, dims)
        one, other, both = (of_reference(x, y, channel_dim) for x, y in (
            (a, narrow.expand(shape)), (narrow.expand(shape), a), (narrow.expand(shape), narrow.expand(shape))))
        for layout in LAYOUTS:
            dense, repeated = LAYOUTS[layout](a, channel_dim), LAYOUTS[layout](narrow, channel_dim).expand(shape)
            assert_equal(one, dense, repeated, channel_dim, (layout, dims))
            assert_equal(other, repeated, dense, channel_dim, (layout, dims))
            assert_equal(both, repeated, repeated, channel_dim, (layout, dims))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "every_other"])
@pytest.mark.parametrize("shape", [(2, 40, 33), (2, 24, 14, 14), (1, 3, 120, 120), (1, 5, 6000, 2)])
def test_rounding_stays_within_the_bound(shape, layout, dtype):
    a = LAYOUTS[layout](normals(shape, dtype, 2), 1)
    g = LAYOUTS[layout](normals(shape, dtype, 3), 1)
    wide_a, wide_g = a.double(), g.double()
    bound = CHAIN * UNIT[dtype]
    sizes = {"channel_sums": reference.channel_sums(wide_a.abs(), wide_g.abs()),
             "channel_dot": (reference.channel_dot(wide_a.abs(), wide_g.abs()),),
             "channel_powers": reference.channel_powers(wide_a, wide_g)}
    for op in OPS:
        exact = results(op, wide_a, wide_g, 1, reference)
        for got, want, size in zip(results(op, a, g, 1), exact, sizes[op], strict=True):
            assert ((got.double() - want).abs() <= bound * size).all(), op


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    dims = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=dims, max_size=dims)))
    channel_dim = draw(st.integers(1, dims - 1))
    dtype = draw(st.sampled_from(DTYPES))
    operands = []
    for seed in (4, 5):
        values = integers(shape, dtype, seed)
        repeats = draw(st.lists(st.integers(0, dims - 1), max_size=2, unique=True))
        order = draw(st.permutations(range(dims)))
        operands.append(poisoned(expanded(values, repeats), order, gap=draw(st.integers(0, 2)),
                                 step=draw(st.integers(1, 2)), offset=draw(st.integers(0, 17))).expand(shape))
    return operands[0], operands[1], channel_dim - draw(st.sampled_from([0, dims]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(layouts())
def test_any_strides(case):
    a, g, channel_dim = case
    context = (a.shape, a.stride(), g.stride(), channel_dim, a.dtype)
    assert_equal(of_reference(a, g, channel_dim), a, g, channel_dim, context)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout_a", ["contiguous", "channels_last", "every_other"])
@pytest.mark.parametrize("layout_g", ["contiguous", "channels_last", "repeated"])
def test_nan_and_infinity_stay_in_their_channel(layout_a, layout_g, dtype):
    a, g = integers((2, 18, 5, 7), dtype, 6), integers((2, 18, 5, 7), dtype, 7)
    a[0, 1, 4, 6] = torch.nan
    a[0, 2, 0, 0] = torch.inf
    a[0, 3, 1, 2], a[0, 3, 1, 3] = torch.inf, -torch.inf
    a[1, 4, 0, 0] = 0
    g[1, 4, 0, 0] = torch.inf  # inf · 0
    g[1, 17, 0, 0] = -torch.inf
    a = LAYOUTS[layout_a](a, 1)
    g = g[:, :, :1, :1].expand_as(g) if layout_g == "repeated" else LAYOUTS[layout_g](g, 1)
    for op in OPS:
        for got, want in zip(results(op, a, g, 1), results(op, a, g, 1, reference), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_converts(dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    dot = ops.channel_dot(values, torch.ones_like(values))
    torch.testing.assert_close(dot, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other"])
@pytest.mark.parametrize("shape", [(1, 3, 300, 301), (16, 64, 28, 28), (512, 40)])
def test_threads_change_no_bit(shape, layout, dtype):
    a, g = LAYOUTS[layout](normals(shape, dtype, 8), 1), LAYOUTS[layout](normals(shape, dtype, 9), 1)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append([x for op in OPS for x in results(op, a, g, 1)])
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outputs[0], other, strict=True))


def test_by_hand():
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [1, 2, 2]
    g = torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    dot, sum_a, sum_g = ops.channel_sums(a, g)
    assert dot.tolist() == [[-1.0, 1.5]]
    assert sum_a.tolist() == [[3.0, 7.0]]
    assert sum_g.tolist() == [[0.0, 0.5]]
    absolute, square = ops.channel_powers(a, g)
    assert absolute.tolist() == [[3.0, 1.5]]
    assert square.tolist() == [[5.0, 2.25]]
