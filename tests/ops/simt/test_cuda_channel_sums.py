"""csrc/cuda/channel_sums.cuh against the reference, element by element and byte by byte."""

import itertools
import mmap

import pytest
import torch
from samples import LAYOUTS as SAMPLE_LAYOUTS
from samples import SHAPES, expanded, expansions, integers, layout_pairs
from shim import DTYPES, LAYOUTS, SUMS_OF, Shim, modelled_reads
from simt_cases import CASES, CHANNELS_LAST, place
from torch import Tensor

from fastscore.ops import reference

MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it

# Allowed error as a multiple of the sum of absolute terms.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 2e-15}


def absolute_sums(op: str, a: Tensor, g: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
    """What the errors of an op are measured against: its sums over absolute terms."""
    expected = getattr(reference, op)(a.double().abs(), g.double().abs(), channel_dim)
    return expected if isinstance(expected, tuple) else (expected,)


def assert_close(op: str, got: tuple[Tensor, ...], a: Tensor, g: Tensor, channel_dim: int) -> None:
    expected = getattr(reference, op)(a.double(), g.double(), channel_dim)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs, scale in zip(got, expected, absolute_sums(op, a, g, channel_dim), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == reference.result_dtype(a.dtype)
        excess = (ours.double() - theirs).abs() - TOLERANCE[a.dtype] * scale
        assert not excess.isnan().any(), "an element was never written, or the margin was read"
        assert (excess <= 0).all(), f"off by {(ours - theirs).abs().max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_against_the_reference(shim: Shim, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    a, g = case.make(dtype)
    geometry = shim.geometry(a, g, case.channel_dim, case.units)
    assert LAYOUTS[geometry.layout] == case.layout
    assert geometry.split.splits > 1 or not name.endswith(("split", "longest"))
    for op in SUMS_OF:
        assert_close(op, shim.channel(op, a, g, case.channel_dim, case.units), a, g, case.channel_dim)
        assert shim.reads.packed_bytes + shim.reads.single_bytes == modelled_reads(geometry, a.element_size())


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES, ids=str)
def test_the_samples_of_the_ops(shim: Shim, shape: tuple[int, ...], channel_dim: int) -> None:
    """Every pair of layouts, one dtype after the other, with sums that are exact."""
    for (layout_a, layout_g), dtype in zip(layout_pairs(), itertools.cycle(DTYPES)):
        a = SAMPLE_LAYOUTS[layout_a](integers(shape, dtype, 0), channel_dim)
        g = SAMPLE_LAYOUTS[layout_g](integers(shape, dtype, 1), channel_dim)
        got = shim.channel("channel_sums", a, g, channel_dim)
        for ours, theirs in zip(got, reference.channel_sums(a, g, channel_dim), strict=True):
            assert torch.equal(ours, theirs), (layout_a, layout_g, dtype)


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES, ids=str)
def test_repeated_values(shim: Shim, shape: tuple[int, ...], channel_dim: int) -> None:
    for dims, (layout, dtype) in itertools.product(expansions(shape, channel_dim),
                                                   zip(SAMPLE_LAYOUTS, itertools.cycle(DTYPES))):
        a = SAMPLE_LAYOUTS[layout](integers(shape, dtype, 0), channel_dim)
        g = SAMPLE_LAYOUTS[layout](expanded(integers(shape, dtype, 1), dims), channel_dim).expand(shape)
        for ours, theirs in zip(shim.channel("channel_powers", a, g, channel_dim),
                                reference.channel_powers(a, g, channel_dim), strict=True):
            assert torch.equal(ours, theirs), (layout, dims, dtype)


@pytest.mark.parametrize("units", [1, 3, 16])
@pytest.mark.parametrize("order", [None, CHANNELS_LAST], ids=["rows", "columns"])
def test_the_same_bits_every_time(shim: Shim, order: tuple[int, ...] | None, units: int) -> None:
    torch.manual_seed(1)
    a, g = (place((1, 4, 80, 80), torch.float32, order) for _ in range(2))
    first, second = (shim.channel("channel_sums", a, g, units=units) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "order"), [((2, 6, 56, 56), None), ((2, 64, 14, 14), CHANNELS_LAST),
                                              ((1, 2048, 7, 7), CHANNELS_LAST)])
def test_common_layouts_are_read_16_bytes_at_a_time(shim: Shim, shape: tuple[int, ...], order: tuple[int, ...] | None,
                                                    dtype: torch.dtype) -> None:
    a, g = (place(shape, dtype, order) for _ in range(2))
    shim.channel("channel_dot", a, g)
    assert shim.reads.single_bytes == 0
    assert shim.reads.packed_bytes == 2 * a.nbytes


def test_rows_that_start_between_boundaries_are_read_in_packs_but_for_their_ends(shim: Shim) -> None:
    a, g = (place((2, 8, 7, 7), torch.bfloat16) for _ in range(2))
    shim.channel("channel_dot", a, g)
    ends = 2 * 16 * 2 * 7 * a.element_size()  # of two tensors' 16 rows: two ends of at most 7 elements
    assert 0 < shim.reads.single_bytes <= ends


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize(("shape", "strides", "channel_dim"), [
    ((3, 2, 8), (2**31 - 24, 8, 1), 1),  # rows: samples apart
    ((2, 3, 8), (8, 2**31 - 24, 1), 1),  # rows: channels apart
    ((3, 2, 8), (2**31 - 24, 8, 1), 2),  # columns: samples apart
    ((2, 3, 8), (8, 2**31 - 24, 1), 2),  # columns: positions apart
    ((2, 2, 3), (2, 1, 2**31 - 24), 2),  # one element at a time
    ((2, 2, 3, 3), (1, 2, 2**30 + 8, 2**31 - 24), 1),  # the same along two dimensions
], ids=str)
def test_indices_beyond_2_to_the_31(shim: Shim, shape: tuple[int, ...], strides: tuple[int, ...],
                                    channel_dim: int) -> None:
    torch.manual_seed(2)
    a, g = (sparse(2**33, torch.bfloat16).as_strided(shape, strides) for _ in range(2))
    values = [torch.randn(shape).bfloat16() for _ in range(2)]
    a.copy_(values[0])
    g.copy_(values[1])
    got = shim.channel("channel_sums", a, g, channel_dim, watched=False)
    assert_close("channel_sums", got, *values, channel_dim)


LONG = 2**32 + 8


@pytest.mark.parametrize(("layout", "strides"), [("rows", (0, LONG, 1)), ("columns", (0, 1, 2)),
                                                 ("strided", (0, 2 * LONG, 2))])
def test_positions_beyond_2_to_the_31(shim: Shim, layout: str, strides: tuple[int, ...]) -> None:
    """Rows so long that their last segment starts beyond 2³¹; only that one runs, the rest are zeros."""
    a, g = (sparse(4 * LONG, torch.float16).as_strided((1, 2, LONG), strides) for _ in range(2))
    a[..., -3:], g[:, 0, -3:], g[:, 1, -3:] = 2, 5, 7
    geometry = shim.geometry(a, g)
    last = geometry.split.splits - 1
    assert LAYOUTS[geometry.layout] == layout
    assert last * geometry.split.segment > 2**31
    sums = shim.channel("channel_sums", a, g, watched=False, first_split=last)
    assert [sum_.tolist() for sum_ in sums] == [[[30, 42]], [[6, 6]], [[15, 21]]]


@pytest.mark.parametrize("op", SUMS_OF)
def test_not_a_number_and_infinity_come_through(shim: Shim, op: str) -> None:
    a, g = (place((1, 4, 8, 8), torch.float32) for _ in range(2))
    a[0, 1, 3, 3], a[0, 2, 0, 0] = torch.nan, torch.inf
    for sums in shim.channel(op, a, g)[:2]:
        assert sums[0, [0, 3]].isfinite().all()
        assert sums[0, 1].isnan()
        assert sums[0, 2].isinf()
