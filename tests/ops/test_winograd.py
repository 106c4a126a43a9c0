"""The op behind 3x3 convolutions of a CPU, held against PyTorch's convolution in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastscore.fastpath.winograd import transformed

BOUND = 1e-5  # of the largest value: sums of a few hundred terms
OP = torch.ops.fastscore.winograd
UNBOUNDED = (-math.inf, math.inf)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int) -> Tensor:
    return random(*shape).contiguous(memory_format=torch.channels_last)


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, int] = (1, 1),
        clamp: tuple[float, float] = UNBOUNDED) -> Tensor:
    made: Tensor = OP(x, transformed(weight), bias, len(weight), *padding, *clamp)
    return made


@settings(max_examples=80, deadline=None)
@given(samples=st.integers(0, 4), inputs=st.integers(1, 40), outputs=st.integers(1, 70),
       size=st.tuples(st.integers(3, 14), st.integers(3, 14)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
       bias=st.booleans(), clamp=st.sampled_from([UNBOUNDED, (0.0, math.inf), (0.0, 6.0), (-0.3, 0.2)]))
def test_is_the_convolution(samples: int, inputs: int, outputs: int, size: tuple[int, int], padding: tuple[int, int],
                            bias: bool, clamp: tuple[float, float]) -> None:
    x, weight = images(samples, inputs, *size), random(outputs, inputs, 3, 3, seed=1)
    shift = random(outputs, seed=2) if bias else None
    made = run(x, weight, shift, padding, clamp)
    plain = F.conv2d(x.double(), weight.double(), None if shift is None else shift.double(), padding=padding)
    wanted = plain.clamp(*clamp)
    assert made.dtype == torch.float32
    assert made.shape == wanted.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    if samples:
        assert float((made - wanted).abs().max()) <= BOUND * float(plain.abs().max())


def test_many_channels_whose_weights_go_beyond_a_cache() -> None:
    x, weight = images(1, 352, 7, 9), random(350, 352, 3, 3, seed=1)
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    assert float((run(x, weight) - wanted).abs().max()) <= BOUND * float(wanted.abs().max())


def test_a_sample_is_the_same_bits_in_any_batch_and_for_any_number_of_threads() -> None:
    x, weight = images(7, 33, 11, 13), random(40, 33, 3, 3, seed=1)
    together, threads = run(x, weight), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            assert torch.equal(run(x, weight), together)
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(run(x[n:n + 1], weight), together[n:n + 1]) for n in range(7))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_through_a_clamp_and_in_its_sample(bad: float) -> None:
    x, weight = images(3, 4, 8, 8), random(5, 4, 3, 3, seed=1)
    plain = run(x, weight, clamp=(0.0, math.inf))
    x[1, 2, 3, 3] = bad
    made = run(x, weight, clamp=(0.0, math.inf))
    assert not made[1].isfinite().all()
    assert torch.equal(made[[0, 2]], plain[[0, 2]])


def test_opcheck() -> None:
    arguments = (images(2, 3, 5, 6), transformed(random(4, 3, 3, 3)), random(4), 4, 1, 0, 0.0, 6.0)
    torch.library.opcheck(OP.default, arguments)


X, WEIGHT = images(2, 3, 5, 6), transformed(random(4, 3, 3, 3))


@pytest.mark.parametrize(("arguments", "message"), [
    ((X.contiguous(), WEIGHT, None, 4, 1, 1, 0.0, 1.0), "in channels last"),
    ((X.double(), WEIGHT, None, 4, 1, 1, 0.0, 1.0), "x has to be float32"),
    ((X[0], WEIGHT, None, 4, 1, 1, 0.0, 1.0), "x has to be float32"),
    ((X[:, :, :2], WEIGHT, None, 4, 0, 1, 0.0, 1.0), "in channels last|smaller than a 3x3 kernel"),
    ((images(1, 3, 2, 6), WEIGHT, None, 4, 0, 1, 0.0, 1.0), "x is 2 high and 6 wide"),
    ((X, WEIGHT, None, 4, -1, 1, 0.0, 1.0), "smaller than a 3x3 kernel"),
    ((X, WEIGHT[:35], None, 4, 1, 1, 0.0, 1.0), "weight has to be contiguous"),
    ((X, WEIGHT, None, 33, 1, 1, 0.0, 1.0), "weight has to be contiguous"),
    ((X, WEIGHT.double(), None, 4, 1, 1, 0.0, 1.0), "weight has to be contiguous"),
    ((X, WEIGHT, random(3), 4, 1, 1, 0.0, 1.0), "bias has to be contiguous"),
])
def test_bad_arguments_are_told(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments)
