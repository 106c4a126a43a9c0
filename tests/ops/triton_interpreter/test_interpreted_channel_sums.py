"""channel_sums, channel_dot and channel_powers in Triton, against the float64 reference.

Of each dtype and layout another seventeenth of the kinds of launch, and of each view and op one dtype, by turns;
FASTSCORE_NIGHTLY=1 takes all.
"""

import math

import pytest
import torch
import triton_traffic
from cases import SMS, Case, cases, kind, strides
from guards import output, poisoned, untouched
from thinned import NIGHTLY, thinned
from torch import Tensor

from fastscore.ops import reference
from fastscore.ops.triton import channel_sums as kernels
from fastscore.ops.triton.launch import ChannelLaunch, plan_channel_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = 8  # of a term on its way into a sum, at most: tiles in a row, then a tree
CPU = torch.device("cpu")
STEP = 1 if NIGHTLY else 17


def terms(a: Tensor, g: Tensor, reducer: str, channel_dim: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the exact sums, the same of absolute values) in float64."""
    a, g = a.double(), g.double()
    sums = {"dot": lambda *x: (reference.channel_dot(*x),), "sums": reference.channel_sums,
            "powers": reference.channel_powers}[reducer]
    return sums(a, g, channel_dim), sums(a.abs(), g.abs(), channel_dim)


def check(a: Tensor, g: Tensor, reducer: str, channel_dim: int = 1, sms: int = SMS,
          mean: bool = False) -> ChannelLaunch:
    plan = plan_channel_sums(tuple(a.shape), a.stride(), g.stride(), channel_dim, a.element_size(), sms)
    dtype = reference.result_dtype(a.dtype)
    sums, buffer = output(plan.rows * kernels.SUMS[reducer], dtype)
    kernels.launch(plan, CPU, a.dtype, reducer, mean)((a, g, sums))
    exact, magnitude = terms(a, g, reducer, channel_dim)
    outs = sums.view(kernels.SUMS[reducer], -1).clone()
    if mean:
        outs[1] *= plan.positions
    for out, want, size in zip(outs, exact, magnitude, strict=True):
        error = (out.double() - want.flatten()).abs()
        assert (error <= ROUNDINGS * torch.finfo(dtype).eps * size.flatten()).all(), (plan, error.max())
    assert untouched(buffer)
    return plan


def pair(case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, g = (poisoned(case.shape, stride, dtype)[0] for stride in (case.a, case.g))
    for x in (a, g):
        x.copy_(torch.randn(case.shape, generator=generator))
    return a, g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed"])
def test_every_kind_of_launch_is_right_and_moves_the_bytes_of_the_model(dtype, layout, loads, poisoned_memory):
    chosen = {kind: case for kind, case in cases(dtype.itemsize).items() if kind.layout == layout}
    for i, case in list(enumerate(chosen.values()))[DTYPES.index(dtype) % STEP::STEP]:
        reducer = tuple(kernels.SUMS)[i % 3]
        loads.bytes = 0
        check(*pair(case, dtype, i), reducer, mean=reducer == "sums" and i % 2 == 0)
        moved = triton_traffic.channel_sums(case.plan(dtype.itemsize), kernels.SUMS[reducer], dtype.itemsize,
                                     reference.result_dtype(dtype).itemsize)
        # Of the partial sums, the half that is read.
        assert loads.bytes == moved.inputs + moved.partials // 2, case
    assert len(chosen) > 100


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_cases_are_all_that_the_heuristic_can_produce(itemsize):
    generator = torch.Generator().manual_seed(itemsize)
    covered = set(cases(itemsize))
    for _ in range(4000):
        exponents = torch.rand(3, generator=generator) * torch.tensor([3.0, 12.0, 15.0])
        shape = tuple(int(2**exponent) for exponent in exponents)
        sms = (1, 16, 132)[int(torch.randint(3, (), generator=generator))]
        for a, g in strides(shape).values():
            assert kind(plan_channel_sums(shape, a, g, 1, itemsize, sms)) in covered, (shape, a, g, sms)


@pytest.mark.parametrize(("channels", "splits"), [(32, 33), (33, 32), *([(32, 32)] if NIGHTLY else [])])
def test_more_splits_and_rows_than_one_load_of_partial_sums(channels, splits, poisoned_memory):
    a, g = torch.randn(2, 1, channels, 128 * splits, generator=torch.Generator().manual_seed(splits))
    plan = check(a.mT.contiguous().mT, g.mT.contiguous().mT, "sums", sms=16, mean=splits % 2 == 0)
    assert (plan.layout, plan.splits) == ("columns", splits)


VIEWS = {
    "one value of g for a channel": lambda x: (x, x[:, :, :1, :1].expand_as(x)),
    "one value of g for all": lambda x: (x, x[:1, :1, :1, :1].expand_as(x)),
    "one sample of a for all": lambda x: (x[:1].expand_as(x), x),
    "inner positions": lambda x: (x[:, :, 1:-1, 1:-1], x[:, :, :-2, 2:]),
    "every second column": lambda x: (x[..., ::2], x[..., 1::2]),
    "every second channel of channels last": lambda x: (x.to(memory_format=torch.channels_last)[:, ::2],) * 2,
    "transposed positions": lambda x: (x, x.transpose(2, 3).contiguous().transpose(2, 3)),
    "samples last in memory": lambda x: (x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), x),
    "offset": lambda x: (torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x), x),
    "channels last, one pixel": lambda x: (x[:, :, :1, :1].to(memory_format=torch.channels_last), x[:, :, 1:2, 1:2]),
}


@pytest.mark.parametrize(("view", "reducer", "dtype"), thinned(VIEWS, kernels.SUMS, DTYPES), ids=str)
def test_views(view, dtype, reducer):
    x = torch.randn(3, 10, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(*VIEWS[view](x), reducer)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4), (2, 3, 2, 1, 3, 2), (1, 1),
                                   (1, 1, 1)],
                         ids=str)
def test_any_dimension_can_hold_the_channels(shape):
    a, g = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    for dim in range(1, len(shape)):
        check(a, g, "sums", dim)
        check(a, g.transpose(-1, -2).contiguous().transpose(-1, -2), "sums", dim)


@pytest.mark.parametrize(("step", "size"), [(2**30, 4), (2**31 + 16, 2)])
@pytest.mark.parametrize("axis", range(3), ids=["samples", "channels", "positions"])
def test_addresses_beyond_32_bits(axis, step, size):
    """Steps that 32 bits hold and whose multiples they do not, and steps that they do not hold."""
    buffer = torch.empty(step * (size - 1) + 64, dtype=torch.float16)  # virtual: pages in between are never touched
    shape, strides = [2, 2, 2], [4, 2, 1]
    shape[axis], strides[axis] = size, step
    a = buffer.as_strided(shape, strides)
    a.copy_(torch.arange(1.0, 1.0 + a.numel()).view_as(a))
    check(a, a, "sums")


def test_same_bits_every_time():
    a, g = torch.randn(2, 1, 1, 96, 96, generator=torch.Generator().manual_seed(2))
    first, second = kernels.channel_sums(a, g), kernels.channel_sums(a, g)
    assert plan_channel_sums(tuple(a.shape), a.stride(), g.stride(), 1, 4, SMS).splits > 1
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_magnitudes_beyond_the_inputs_own_dtype():
    a = torch.full((1, 2, 64), 300.0, dtype=torch.float16)
    assert kernels.channel_dot(a, a).tolist() == [[300.0**2 * 64] * 2]  # beyond float16
    assert math.isinf(kernels.channel_powers(a.float() * 1e18, a.float() * 1e18)[1][0, 0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape):
    x = torch.empty(shape)
    for out in kernels.channel_sums(x, x):
        assert torch.equal(out, torch.zeros(shape[:2]))
