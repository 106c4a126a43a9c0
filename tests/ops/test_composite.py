"""The ops as operations of PyTorch, for devices without kernels: against the reference, and in score()."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, LAYOUTS, SHAPES, integers, normals
from torch import Tensor

from fastscore import ops
from fastscore.ops import composite, reference
from fastscore.ops.backends import FAMILIES, BackendName

ROUNDINGS = {torch.float32: 4e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-14}


def stacked(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(out) if isinstance(out, tuple) else out


def test_every_op_has_one_for_any_device() -> None:
    for op in FAMILIES:
        for key in ("XPU", "MPS", "PrivateUse1", "HPU", "XLA"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastscore::{op}", key)
        assert callable(getattr(composite, op))


@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, lambda x: x.to_sparse_csr(),
                                  lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)])
def test_tensors_that_are_not_dense_are_refused(made: Callable[[Tensor], Tensor]) -> None:
    x = made(torch.ones(2, 3))
    for op, args in (("channel_powers", (x, x)), ("channel_sums", (x, x)), ("normalize_gradient", (x,))):
        with pytest.raises((TypeError, RuntimeError), match=r"dense|Could not run"):
            getattr(torch.ops.fastscore, op)(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_sums(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype) -> None:
    a, g = integers(shape, dtype, 0), integers(shape, dtype, 1)
    for layout in ("contiguous", "channels_last", "cropped"):
        x, y = LAYOUTS[layout](a, channel_dim), LAYOUTS["contiguous"](g, channel_dim)
        for op in ("channel_sums", "channel_dot", "channel_powers"):
            got = getattr(composite, op)(x, y, channel_dim)
            want = stacked(getattr(reference, op)(a, g, channel_dim))
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert torch.equal(got, want), (op, layout)
        torch.testing.assert_close(composite.channel_sums(x, y, channel_dim, True),
                                   stacked(reference.channel_sums(a, g, channel_dim, True)), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_clamp_backward(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=4)))
    bounds = data.draw(st.sampled_from([(0.0, torch.inf), (0.0, 6.0), (-0.3, 0.7)]))
    y, g, rest = (normals(shape, dtype, seed) for seed in range(3))
    y = y.clamp(*bounds)
    given = rest if data.draw(st.booleans()) else None
    *want, of_y, of_g = reference.clamp_backward(y, g, given, *bounds)
    changed = g.clone()
    sums = composite.clamp_backward_(y, changed, given, *bounds)
    assert torch.equal(changed, want[0])
    torch.testing.assert_close(sums, torch.stack([want[1], of_y, of_g]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_gradient(dtype: torch.dtype, eps: float) -> None:
    rows = [normals((257,), torch.float64, 0), torch.zeros(257)]
    if dtype in (torch.float32, torch.bfloat16):
        rows += [rows[0] * 1e-42, rows[0] * 1e-30, rows[0] * 3e37]
    for special in (torch.nan, torch.inf, -torch.inf):
        rows.append(rows[0].clone().index_fill(0, torch.tensor([3]), special))
    for g in (torch.stack(rows).to(dtype), torch.empty(0, 3, dtype=dtype), torch.empty(2, 0, dtype=dtype)):
        unit, length = composite.normalize_gradient(g, eps)
        want_unit, want_length = reference.normalize_gradient(g, eps)
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(unit, want_unit, rtol=ROUNDINGS[dtype], atol=tiny, equal_nan=True)
        torch.testing.assert_close(length, want_length, rtol=ROUNDINGS[length.dtype], atol=0, equal_nan=True)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_random_gradients_are_the_kernels_bits(distribution: str) -> None:
    arguments = (torch.arange(5) * 2**33, 11, -3, 2, distribution, True, torch.bfloat16)
    assert torch.equal(composite.random_gradient(*arguments), torch.ops.fastscore.random_gradient(*arguments))


def test_it_can_be_chosen() -> None:
    a, g = torch.randn(2, 2, 3, 4, 5)
    plain = ops.channel_sums(a, g)
    with ops.use_backend("composite"):
        torch.testing.assert_close(ops.channel_sums(a, g), plain)
        torch.library.opcheck(torch.ops.fastscore.channel_sums.default, (a, g))
        torch.library.opcheck(torch.ops.fastscore.normalize_gradient.default, (g,))


@pytest.mark.parametrize("backend", ["composite", "reference"])
@pytest.mark.parametrize("op", ["channel_sums", "channel_dot", "channel_powers"])
def test_operands_are_not_broadcast(backend: BackendName, op: str) -> None:
    with ops.use_backend(backend):
        for call in (getattr(ops, op), getattr(torch.ops.fastscore, op)):
            with pytest.raises(ValueError, match="differ in shape"):
                call(torch.ones(2, 3, 4), torch.ones(1, 3, 4))
