"""clamp_backward against the float64 reference, and against PyTorch's own sums and masks in the dtype."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import CHAIN, DTYPES, LAYOUTS, SHAPES, UNIT, expanded, expansions, integers, normals, poisoned
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
    for k, ends in enumerate(ENDS):
        y, g, rest = whole(shape, dtype, ends)
        for i, (layout, lay_out) in enumerate(LAYOUTS.items()):
            for j, (layout_g, layout_rest) in enumerate(OTHERS):
                if (i + j + k) % 3:
                    continue  # each pair of layouts with one of the ends
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


RAW = torch.ops.fastscore.clamp_backward_.default
Y = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout, with_rest, requires_grad):
    y, g, rest = (x.contiguous(memory_format=layout).clone().requires_grad_(requires_grad)
                  for x in (Y, Y.cos(), Y.sin()))
    torch.library.opcheck(RAW, (y, g, rest if with_rest else None, -1.0, 1.0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout_g", [torch.contiguous_format, torch.channels_last])
def test_compiles_whole(layout_g, overwrite, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(ops.clamp_backward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 2):
        y = Y[:batch]
        for rest in (None, y.sin()):
            g, again = (y.cos().contiguous(memory_format=layout_g) for _ in range(2))
            want = ops.clamp_backward(y, g, rest, -1.0, 1.0, overwrite)
            out = compiled(y, again, rest, -1.0, 1.0, overwrite)
            assert all(torch.equal(x, w) and x.stride() == w.stride() for x, w in zip(out, want, strict=True))
            assert torch.equal(g, again)
            assert (out[0].data_ptr() == again.data_ptr()) == (want[0].data_ptr() == g.data_ptr())


def test_shapes_without_data():
    y = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)
    out = ops.clamp_backward(y, torch.empty_like(y), None, *RELU)
    assert [tuple(x.shape) for x in out] == [(2, 3, 4), (2, 3), (2, 3), (2, 3)]
    assert [x.dtype for x in out] == [torch.bfloat16, *[torch.float32] * 3]


def test_results_never_require_grad():
    y, g = Y.clone().requires_grad_(), Y.cos().requires_grad_()
    for out in ops.clamp_backward(y, g.detach(), None, -1.0, 1.0)[1:]:
        assert not out.requires_grad


def test_autograd_knows_that_the_gradient_was_written_to():
    for call in (lambda g: RAW(Y, g, None, -1.0, 1.0), lambda g: RAW(Y, g, Y.sin(), -1.0, 1.0),
                 lambda g: ops.clamp_backward(Y, g, None, -1.0, 1.0, overwrite=True)):
        g, weight = Y.cos(), torch.ones_like(Y, requires_grad=True)
        loss = (g * weight).sum()  # which keeps g as it is for its own backward
        before = g._version
        call(g)
        assert g._version == before + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    g = Y.cos()
    with torch.no_grad():
        RAW(Y, g, None, -1.0, 1.0)
    assert g._version == 1
    ops.clamp_backward(Y, g, None, -1.0, 1.0)  # of a copy
    assert g._version == 1
    with torch.inference_mode():
        g = Y.cos()
        want = ops.clamp_backward(Y.clone(), g, None, -1.0, 1.0)[0]
        ops.clamp_backward(Y.clone(), g, None, -1.0, 1.0, overwrite=True)
        assert torch.equal(g, want)


def test_what_autograd_holds_is_not_belied():
    leaf = Y.cos().requires_grad_()
    g = leaf * 2
    want = ops.clamp_backward(Y, g.detach(), None, -1.0, 1.0)
    for overwrite in (False, True):
        got = ops.clamp_backward(Y, g, None, -1.0, 1.0, overwrite=overwrite)
        assert g._version == 0
        assert all(torch.equal(x, w) and not x.requires_grad for x, w in zip(got, want, strict=True))
    g.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(Y, 2))
    with torch.no_grad():
        assert ops.clamp_backward(Y, g, None, -1.0, 1.0, overwrite=True)[0].data_ptr() == g.data_ptr()


def apart(x: Tensor, by: int, size: int = 0) -> tuple[Tensor, Tensor]:
    """Two tensors like x in one memory, `by` elements from each other."""
    memory = torch.zeros(by + x.numel() + size)
    both = memory[:x.numel()].view_as(x), memory[by:by + x.numel()].view_as(x)
    for each, values in zip(both, (x.cos(), x), strict=True):
        each.copy_(values)
    return both


@pytest.mark.parametrize("inference", [False, True])
def test_the_native_op_refuses_gradients_that_overlap(inference):
    """Under inference_mode too, where no kernel of autograd stands before it."""
    with torch.inference_mode(inference):
        refuses_what_overlaps()


def refuses_what_overlaps() -> None:
    g = Y.cos()
    twice = torch.zeros(2 * Y.numel()).as_strided(Y.shape, (60, 20, 4, 1))  # samples half over each other
    want = g.clone()
    for args, message in (((g, g, None), "g and y overlap in memory.* pass g.clone"),
                          ((Y, g, g), "g and rest overlap in memory"),
                          ((Y[:1].expand_as(Y), g[:1].expand_as(Y), None), "g is neither .* one in memory.* g.clone"),
                          ((twice.clone().as_strided(twice.shape, twice.stride()), twice, None), "one in memory")):
        with pytest.raises(RuntimeError, match=message):
            RAW(*args, -1.0, 1.0)
        assert torch.equal(g, want)
        assert g.is_inference() or g._version == 0
    for by in (1, 7, Y.numel() - 1):
        one, two = apart(Y, by)
        with pytest.raises(RuntimeError, match="overlap"):
            RAW(Y, one, two, -1.0, 1.0)
        with pytest.raises(RuntimeError, match="overlap"):
            RAW(one, two, None, -1.0, 1.0)
    one, two = apart(Y, Y.numel())  # side by side in one memory
    want = reference.clamp_backward(Y, one, two, -1.0, 1.0)[0]
    RAW(Y, one, two, -1.0, 1.0)
    assert torch.equal(one, want)


@pytest.mark.parametrize("by", [0, 1, 20, Y.numel() - 1, Y.numel()])
def test_gradients_that_overlap_are_copied_first(by):
    one, two = apart(Y, by)
    for y, g, rest in ((Y, one, two), (Y, two, one), (two, one, None), (one, two, Y)):
        kept = [None if x is None else x.clone() for x in (y, g, rest)]
        want = reference.clamp_backward(*kept, -0.5, 0.5)
        got = ops.clamp_backward(y, g, rest, -0.5, 0.5, overwrite=True)
        torch.testing.assert_close(got, want)
        assert y is g or torch.equal(y, kept[0])
        assert rest is None or torch.equal(rest, kept[2])
        g.copy_(kept[1])


def clamp(y: Tensor, g: Tensor, rest: Tensor | None = None) -> None:
    ops.clamp_backward(y, g, rest, *RELU, overwrite=True)


ERRORS = {
    "shapes": (lambda: clamp(Y, Y[:2]), ValueError, r"y \[3, 6, 5, 4\] and g \[2, 6, 5, 4\] differ in shape"),
    "shape of rest": (lambda: clamp(Y, Y.cos(), Y[:, :1]), ValueError, r"y \[3, 6, 5, 4\] and rest \[3, 1, 5, 4\]"),
    "dtypes": (lambda: clamp(Y, Y.double()), TypeError, r"y is .*float32 and g is .*float64.*g\.to\(y\.dtype\)"),
    "dtype of rest": (lambda: clamp(Y, Y.cos(), Y.half()), TypeError, r"rest is .*float16.*rest\.to\(y\.dtype\)"),
    "devices": (lambda: clamp(Y, Y.to("meta")), ValueError, r"y is on cpu and g is on meta; move"),
    "device of rest": (lambda: clamp(Y, Y.cos(), Y.to("meta")), ValueError, r"y is on cpu and rest is on meta"),
    "integers": (lambda: clamp(Y.int(), Y.int()), TypeError, r"y has dtype torch.int32.*convert it to float32"),
    "vector": (lambda: clamp(Y[0, 0, 0], Y[0, 0, 1]), ValueError, r"y has 1 dimension.*unsqueeze"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_the_way_out(name):
    call, error, message = ERRORS[name]
    before = Y.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(Y, before)


RAW_ERRORS = {
    "shapes": (lambda g: RAW(Y, g[:, :5], None, *RELU), r"y and g differ in shape; g is a gradient of y"),
    "strides": (lambda g: RAW(Y, g.to(memory_format=torch.channels_last), None, *RELU),
                r"y and g differ in strides; copy g, as in torch\.empty_like\(y\)\.copy_\(g\)"),
    "strides of rest": (lambda g: RAW(Y, g, g.to(memory_format=torch.channels_last), *RELU),
                        r"y and rest differ in strides; copy rest"),
    "dtypes": (lambda g: RAW(Y, g.double(), None, *RELU), r"y and g differ in dtype; .* g\.to\(y\.dtype\)"),
    "dtype of rest": (lambda g: RAW(Y, g, g.double(), *RELU), r"y and rest differ in dtype; convert rest"),
    "integers": (lambda g: RAW(Y.int(), g.int(), None, *RELU), r"unsupported dtype; convert to float32"),
    "layout": (lambda g: RAW(Y[:, :, :, ::2], g[:, :, :, ::2], None, *RELU),
               r"y is neither contiguous nor channels last; copy y, g and rest, as in y\.contiguous\(\)"),
    "repeated": (lambda g: RAW(Y[..., :1].expand_as(Y), g[..., :1].expand_as(g), None, *RELU), r"is neither"),
    "vector": (lambda g: RAW(Y[0, 0, 0], g[0, 0, 0], None, *RELU), r"y has 1 dimensions, .* 2 to 64; reshape it"),
}


@pytest.mark.parametrize("name", RAW_ERRORS)
def test_the_native_op_checks_what_memory_safety_needs(name):
    call, message = RAW_ERRORS[name]
    g = Y.cos()
    with pytest.raises(RuntimeError, match=message):
        call(g)
    assert torch.equal(g, Y.cos())
