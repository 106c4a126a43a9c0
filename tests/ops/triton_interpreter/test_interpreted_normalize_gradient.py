"""normalize_gradient in Triton, against the float64 reference.

Of each dtype another fourth of the lengths; FASTSCORE_NIGHTLY=1 takes all.
"""

import os

import pytest
import torch
import triton_traffic
from guards import output, poisoned, untouched
from torch import Tensor

from fastscore.ops import reference
from fastscore.ops.triton import normalize_gradient as kernels
from fastscore.ops.triton.launch import NORMALIZE_BLOCK, plan_normalize_gradient

CPU = torch.device("cpu")
STEP = 1 if "FASTSCORE_NIGHTLY" in os.environ else 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The interpreter truncates float32 to bfloat16 where the compiler rounds to nearest: one unit in the last place. Its
# fma rounds twice.
ULPS = {torch.float32: 1.5, torch.bfloat16: 1.0, torch.float16: 0.75, torch.float64: 2.0}
LENGTHS = sorted({2**power + step for power in range(14) for step in (-1, 0, 1)} - {0})


def check(g: Tensor, eps: float = 0.0) -> None:
    unit, buffer = poisoned(tuple(g.shape), torch.empty_like(g).stride(), g.dtype)
    norm, norm_buffer = output(len(g), reference.result_dtype(g.dtype))
    plan = plan_normalize_gradient(tuple(g.shape), g.stride(), unit.stride(), g.element_size())
    kernels.launch(plan, CPU, eps)((g, unit, norm))
    exact_unit, exact_norm = reference.normalize_gradient(g.double(), eps)
    tolerance = ULPS[g.dtype] * torch.finfo(g.dtype).eps
    torch.testing.assert_close(unit.double(), exact_unit, rtol=tolerance, atol=torch.finfo(g.dtype).smallest_normal,
                               equal_nan=True)
    torch.testing.assert_close(norm.double(), exact_norm.to(norm.dtype).double(), rtol=torch.finfo(norm.dtype).eps,
                               atol=0, equal_nan=True)
    assert untouched(buffer)
    assert untouched(norm_buffer)


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_launch(dtype, poisoned_memory):
    for length in LENGTHS[DTYPES.index(dtype) % STEP::STEP]:
        within, _ = poisoned((2, length), (length + 3, 1), dtype)
        check(within.copy_(sample((2, length), dtype)))
    plans = [plan_normalize_gradient((2, n), (n, 1), (n, 1), dtype.itemsize) for n in LENGTHS]
    assert {plan.block for plan in plans} == {2**power for power in range(14)}
    assert {plan.splits for plan in plans} == {1, 2}


def test_a_sample_of_more_programs_than_one_load_of_lengths():
    check(sample((1, NORMALIZE_BLOCK * 128 + 5), torch.float16))


VIEWS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "samples last in memory": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "inner": lambda x: x[:, 1:, :-1, ::2],
    "a number per sample": lambda x: x[:, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, dtype):
    check(VIEWS[view](sample((3, 4, 5, 6), dtype)))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 2.0, 1e30])
def test_the_floor_of_the_length(eps):
    check(torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [0.6, 0.8], [3.0, 4.0]]), eps)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e25, 3e38])
def test_lengths_whose_square_is_no_float32(scale):
    check(torch.tensor([[1.0, -0.5, 0.25], [0.0, 1.0, 0.0]]) * scale)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("eps", [0.0, 5e-324, 1.0])
def test_what_is_not_finite(eps):
    check(torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 2.0], [0.0, 0.0]]), eps)


@pytest.mark.parametrize("length", [1000, NORMALIZE_BLOCK, 2 * NORMALIZE_BLOCK + 1])
def test_bytes_of_the_model(length, loads):
    g = sample((3, length), torch.float32)
    kernels.normalize_gradient(g)
    plan = plan_normalize_gradient((3, length), g.stride(), g.stride(), 4)
    moved = triton_traffic.normalize_gradient(plan, 4, 4)
    written = 8 * plan.grid[0] if plan.splits > 1 else 0
    assert loads.bytes == moved.inputs + moved.partials - written
    assert moved.outputs == g.nbytes + 3 * 4


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape):
    unit, norm = kernels.normalize_gradient(torch.empty(shape))
    assert unit.shape == shape
    assert torch.equal(norm, torch.zeros(shape[0]))
