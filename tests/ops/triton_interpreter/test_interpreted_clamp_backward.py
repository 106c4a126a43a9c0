"""clamp_backward_ in Triton, against the float64 reference."""

import os

import pytest
import torch
from cases import SMS, cases
from guards import output, poisoned, untouched
from torch import Tensor

from fastscore.ops import reference
from fastscore.ops.checks import rounded
from fastscore.ops.triton import clamp_backward as kernels
from fastscore.ops.triton.launch import ChannelLaunch, plan_channel_sums

CPU = torch.device("cpu")
BOUNDS = [(0.0, float("inf")), (0.0, 6.0), (-0.3, 0.7)]
ROUNDINGS = 8


def made(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, seed: int,
         bounds: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
    """(numbers of these strides within NaN, the buffer); bounds: what a clamp made of them."""
    x, buffer = poisoned(shape, strides, dtype)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.copy_(values if bounds is None else values.to(dtype).clamp(*bounds)), buffer


def check(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, with_rest: bool,
          bounds: tuple[float, float], mean: bool, seed: int = 0) -> ChannelLaunch:
    y, of_y = made(shape, strides, dtype, seed, bounds)
    g, of_g = made(shape, strides, dtype, seed + 1)
    rest = made(shape, strides, dtype, seed + 2)[0] if with_rest else None
    want = reference.clamp_backward(y, g, rest, *bounds)[0]
    plan = plan_channel_sums(shape, strides, strides, 1, dtype.itemsize, SMS)
    assert plan.layout in ("rows", "columns")
    sums, of_sums = output(3 * plan.rows, reference.result_dtype(dtype))
    sizes = reference.channel_sums(y.double().abs(), g.double().abs())
    exact = reference.channel_sums(y.double(), g.double())
    launch = kernels.launch(plan, CPU, dtype, rest is not None, rounded(bounds, dtype), mean)
    launch((y, g, y if rest is None else rest, sums))
    # the interpreter truncates float32 to bfloat16 where the compiler rounds to nearest
    ulp = torch.finfo(dtype).eps if with_rest and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(g, want, rtol=ulp, atol=0)
    found = sums.view(3, -1).double()
    if mean:
        found[1] *= plan.positions
    for got, to_be, size in zip(found, exact, sizes, strict=True):
        assert ((got - to_be.flatten()).abs() <= ROUNDINGS * torch.finfo(sums.dtype).eps * size.flatten()).all()
    assert all(untouched(buffer) for buffer in (of_y, of_g, of_sums))
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_every_kind_of_launch(dtype, layout, poisoned_memory):
    chosen = {kind: case for kind, case in cases(dtype.itemsize).items() if kind.layout == layout}
    splits = set()
    for i, case in enumerate(list(chosen.values())[::3 if "FASTSCORE_NIGHTLY" in os.environ else 7]):
        splits.add(check(case.shape, case.a, dtype, i % 2 == 0, BOUNDS[i % 3], i % 5 < 2, i).splits > 1)
    assert splits == {True, False}


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images_in_both_layouts(with_rest, bounds, dtype):
    for strides in ((210, 30, 6, 1), (210, 1, 42, 7)):
        check((2, 7, 5, 6), strides, dtype, with_rest, bounds, mean=True)


def test_what_is_not_a_number_lets_the_gradient_through():
    y, g = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, 0.5]]), torch.ones(1, 5)
    kernels.clamp_backward_(y, g, None, 0.0, torch.inf)
    assert g.tolist() == [[1, 0, 0, 0, 1]]


def test_other_strides_are_refused_and_nothing_is_written():
    y, g = torch.randn(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="y and g differ in strides; copy g"):
        kernels.clamp_backward_(y, g.to(memory_format=torch.channels_last), None, 0.0, 1.0)
    assert kernels.clamp_backward_(torch.empty(0, 3), torch.empty(0, 3), None, 0.0, 1.0).shape == (3, 0, 3)
