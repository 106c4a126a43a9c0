"""clamp_backward as an op: to torch.compile and autograd, gradients that share memory, what it refuses."""

import math

import pytest
import torch
from thinned import thinned
from torch import Tensor

from fastscore import ops
from fastscore.ops import reference

RELU = (0.0, math.inf)
RAW = torch.ops.fastscore.clamp_backward_.default
Y = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout, with_rest, requires_grad):
    y, g, rest = (x.contiguous(memory_format=layout).clone().requires_grad_(requires_grad)
                  for x in (Y, Y.cos(), Y.sin()))
    torch.library.opcheck(RAW, (y, g, rest if with_rest else None, -1.0, 1.0))


@pytest.mark.parametrize(("layout_g", "overwrite", "dynamic"), thinned(
    [torch.contiguous_format, torch.channels_last], [False, True], [False, True]))
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
