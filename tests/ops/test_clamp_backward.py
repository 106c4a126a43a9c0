"""clamp_backward against the float64 reference, and against PyTorch's own sums and masks in the dtype."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import CHAIN, DTYPES, LAYOUTS, SHAPES, UNIT, expanded, expansions, integers, normals, poisoned
from thinned import NIGHTLY
from torch import Tensor

from fastscore import ops
from fastscore.ops import reference

RELU = (0.0, math.inf)
ENDS = [RELU, (0.0, 6.0), (-1.0, 1.0)]
EVERY_SHAPE = [*dict.fromkeys(shape for shape, _ in SHAPES),
               (2, 3, 24, 23), (3, 2, 5, 1), (2, 70, 1, 5)]  # few channels in two chunks; few; lines of one position
# layouts of g and rest beside each one of y, which "same" is
OTHERS = [("same", "same"), ("same", None), ("channels_last", "contiguous"), ("cropped", "same"),
          ("same", "every_other"), ("contiguous", None), ("reversed", "cropped_channels_last")]


def bits(x: Tensor) -> Tensor:
    """Of its elements; those of every NaN are the same."""
    x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def memory(x: Tensor) -> Tensor:
    """All that `x` is a view of."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


def unread(x: Tensor) -> Tensor:
    """Which elements of its memory `x` has no part in."""
    mask = torch.ones(len(memory(x)), dtype=torch.bool)
    mask.as_strided(x.shape, x.stride(), x.storage_offset())[...] = False
    return mask


def clamped(y: Tensor, g: Tensor, rest: Tensor | None, ends: tuple[float, float], overwrite: bool,
            context: object = None) -> list[tuple[Tensor, Tensor]]:
    """The three sums, and the reference's. All else is checked here: the gradient, who shares memory, and the rest of
    that."""
    wants = reference.clamp_backward(y, g, rest, *ends)
    total = g if rest is None else g + rest
    outside = (y <= ends[0]) | (y >= ends[1])
    before = [None if x is None else bits(memory(x).clone()) for x in (y, g, rest)]
    gradient, *sums = ops.clamp_backward(y, g, rest, *ends, overwrite=overwrite)
    assert gradient.dtype == y.dtype, context
    same = y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))
    assert gradient.stride() == (y if same else torch.empty(y.shape)).stride(), context
    for want in (wants[0], torch.where(outside, torch.zeros_like(total), total)):
        assert torch.equal(bits(gradient), bits(want)), context
    in_place = overwrite and g.stride() == gradient.stride()
    if y.numel():
        assert (gradient.data_ptr() == g.data_ptr()) == in_place, context
    for x, old in zip((y, g, rest), before, strict=True):
        if x is not None:
            keep = unread(x) if x is g and in_place else torch.ones(len(memory(x)), dtype=torch.bool)
            assert torch.equal(bits(memory(x))[keep], old[keep]), context
    for got, want in zip(sums, wants[1:], strict=True):
        assert (got.dtype, got.shape, got.is_contiguous()) == (want.dtype, want.shape, True), context
    return list(zip(sums, wants[1:], strict=True))


def assert_exact(*args: object) -> None:
    for got, want in clamped(*args):
        assert torch.equal(got, want), args[-1]


def whole(shape: tuple[int, ...], dtype: torch.dtype, ends: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """y, of which many are at the ends, g and rest; every sum of theirs is exact in float32."""
    y = (3 * integers(shape, dtype, 0) if ends[1] == 6 else integers(shape, dtype, 0)).clamp(*ends)
    return y, integers(shape, dtype, 1), integers(shape, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_layouts(shape, dtype):
    turn = DTYPES.index(dtype) + EVERY_SHAPE.index(shape)
    for k, ends in enumerate(ENDS):
        y, g, rest = whole(shape, dtype, ends)
        for i, (layout, lay_out) in enumerate(LAYOUTS.items()):
            for j, (layout_g, layout_rest) in enumerate(OTHERS):
                if (i + j + k + turn) % (6 if NIGHTLY else 12):
                    continue  # each pair of layouts, by turns, with some of the ends and dtypes
                more = None if layout_rest is None else \
                    (lay_out if layout_rest == "same" else LAYOUTS[layout_rest])(rest, 1)
                assert_exact(lay_out(y, 1), (lay_out if layout_g == "same" else LAYOUTS[layout_g])(g, 1), more, ends,
                             (i + j) % 4 > 0, (ends, layout, layout_g, layout_rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 3), (2, 16, 49), (3, 8, 7, 7), (2, 3, 5, 4), (2, 4, 3, 5, 2), (2, 3, 0, 4)])
def test_repeated_values(shape, dtype):
    y, g, rest = whole(shape, dtype, ENDS[1])
    for dims in expansions(shape, 1):
        for layout in ("contiguous", "channels_last", "every_other"):
            one, few, more = (LAYOUTS[layout](expanded(x, dims), 1).expand(shape) for x in (y, g, rest))
            dense = LAYOUTS[layout](y, 1)
            for overwrite in (False, True):
                assert_exact(dense, few, None, ENDS[1], overwrite, (layout, dims))
                assert_exact(dense, LAYOUTS[layout](g, 1), more, ENDS[1], overwrite, (layout, dims))
                assert_exact(one, few, more, ENDS[1], overwrite, (layout, dims))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, tuple[float, float], bool]:
    shape = tuple(draw(st.lists(st.one_of(st.integers(0, 9), st.sampled_from([17, 33])), min_size=2, max_size=5)
                       .filter(lambda sizes: math.prod(sizes) <= 20_000)))
    ends = draw(st.sampled_from(ENDS))
    dims = range(len(shape))
    orders = st.sampled_from([list(dims), [0, *dims[2:], 1]]) | st.permutations(dims)
    order = draw(orders)
    operands = []
    for values in whole(shape, draw(st.sampled_from(DTYPES)), ends):
        repeats = draw(st.lists(st.sampled_from(dims), max_size=2, unique=True)) if draw(st.integers(0, 3)) == 0 else []
        operands.append(poisoned(expanded(values, repeats), order if draw(st.booleans()) else draw(orders),
                                 gap=draw(st.sampled_from([0, 0, 1])), step=draw(st.sampled_from([1, 1, 2])),
                                 offset=draw(st.integers(0, 17))).expand(shape))
    y, g, rest = operands
    return y, g, draw(st.sampled_from([rest, None])), ends, draw(st.booleans())


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_shape_and_strides(case):
    y, g, rest, ends, overwrite = case
    assert_exact(*case, (y.shape, y.dtype, ends, overwrite,
                         *(None if x is None else x.stride() for x in (y, g, rest))))


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 40, 33), (2, 24, 14, 14), (1, 3, 120, 120), (1, 5, 6000, 2), (1, 1100, 24, 23)])
def test_rounding_stays_within_the_bound(shape, layout, dtype, with_rest):
    """That of channel_sums, though a row here has half as many sums of its own: signs are random."""
    y, g, rest = (LAYOUTS[layout](x, 1) for x in
                  (normals(shape, dtype, 2).clamp(-1, 1), normals(shape, dtype, 3), normals(shape, dtype, 4)))
    exact = reference.channel_sums(y.double(), g.double())
    sizes = reference.channel_sums(y.double().abs(), g.double().abs())
    sums = [got for got, _ in clamped(y, g, rest if with_rest else None, (-1.0, 1.0), True)]
    for got, want, size in zip(sums, exact, sizes, strict=True):
        assert ((got.double() - want).abs() <= CHAIN * UNIT[dtype] * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other"])
@pytest.mark.parametrize("ends", ENDS)
def test_nan_and_infinity_stay_where_they_are(ends, layout, dtype):
    y, g, rest = whole((2, 18, 5, 7), dtype, ends)
    y[0, 1, 4, 6] = torch.nan  # below no end and above none: the gradient passes
    y[0, 2, 0, 0], y[0, 3, 1, 2] = torch.inf, -torch.inf
    y[1, 4, 0, 0], y[1, 5, 0, 0], y[1, 6, 0, 0] = ends[0], ends[0], 0.5
    g[1, 4, 0, 0], g[1, 5, 0, 0], g[1, 17, 0, 0] = torch.inf, torch.nan, -torch.inf  # at an end: 0 all the same
    rest[1, 6, 0, 0], rest[1, 17, 0, 0] = torch.nan, torch.inf  # of rest there are no sums
    g[0, 1, 4, 6], rest[0, 1, 4, 6] = 2, 3
    for more in (None, rest):
        operands = [None if x is None else LAYOUTS[layout](x, 1) for x in (y, g, more)]
        for got, want in clamped(*operands, ends, True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    gradient, dot, _, total = ops.clamp_backward(y, g, rest, *ends)
    assert gradient[0, 1, 4, 6] == 5
    assert (gradient[1, 4:6, 0, 0] == 0).all()
    assert gradient[1, 6, 0, 0].isnan()
    assert dot.isnan().nonzero().tolist()[0] == [0, 1]
    assert total.isfinite()[1, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    for ends in (*ENDS, (0.1, 0.7)):
        for g, rest in ((values.flip(1), None), (torch.ones_like(values), values.roll(77)), (values.roll(3), values)):
            for got, want in clamped(values, g, rest, ends, False):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_keep_their_sign(dtype):
    y = torch.tensor([[0.5, -0.0, 0.0, 0.5, 0.5]], dtype=dtype)
    g = torch.tensor([[-0.0, -1.0, -0.0, 0.0, -0.0]], dtype=dtype)
    rest = torch.tensor([[-0.0, -1.0, -0.0, -0.0, 0.0]], dtype=dtype)
    assert ops.clamp_backward(y, g, None, *RELU)[0].signbit().tolist() == [[True, False, False, False, True]]
    assert ops.clamp_backward(y, g, rest, *RELU)[0].signbit().tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [(-0.1, 0.1), (-0.7, 0.35), (0.3, 6e4), *ENDS])
def test_the_gradient_is_that_of_autograd(ends, dtype):
    """Also where the dtype holds no such end: the clamp rounded it, and what it made is not beyond."""
    x, g = normals((4, 500), dtype, 5), normals((4, 500), dtype, 6)
    x = x[:, (x[..., None] != torch.tensor(ends, dtype=dtype)).all(2).all(0)].requires_grad_()  # at an end PyTorch errs
    y, g = F.hardtanh(x, *ends), g[:, :x.shape[1]]
    (want,) = torch.autograd.grad(y, x, g)
    assert torch.equal(ops.clamp_backward(y.detach(), g, None, *ends)[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 3, 300, 301), (16, 64, 28, 28), (512, 40), (2, 1100, 24, 23)])
def test_threads_change_no_bit(shape, layout, dtype):
    y, g, rest = (LAYOUTS[layout](normals(shape, dtype, seed), 1) for seed in (7, 8, 9))
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(ops.clamp_backward(y, g, rest, 0.0, 1.0))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(outputs[0], other, strict=True))


def test_the_same_tensor_twice():
    """What a clamp made may come back as its own gradient, and as both of its gradients."""
    for layout in ("contiguous", "channels_last"):
        y, g, _ = (LAYOUTS[layout](x, 1) for x in whole((2, 5, 6, 7), torch.float32, ENDS[2]))
        assert_exact(y, y, y, ENDS[2], False, layout)
        want = reference.clamp_backward(y, g, g, *ENDS[2])
        assert all(torch.equal(x, w) for x, w in zip(ops.clamp_backward(y, g, g, *ENDS[2], overwrite=True), want,
                                                     strict=True))


def test_by_hand():
    y = torch.tensor([[[0.0, 2.0], [6.0, 4.0]]])
    g = torch.tensor([[[1.0, -1.0], [0.5, 0.25]]])
    gradient, dot, sum_y, sum_g = ops.clamp_backward(y, g, torch.full_like(y, 10), 0.0, 6.0, overwrite=True)
    assert gradient.tolist() == g.tolist() == [[[0.0, 9.0], [0.0, 10.25]]]
    assert dot.tolist() == [[-2.0, 4.0]]
    assert sum_y.tolist() == [[2.0, 10.0]]
    assert sum_g.tolist() == [[0.0, 0.75]]
