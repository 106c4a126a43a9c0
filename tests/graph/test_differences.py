"""Whether all is close, told by the largest number first, against each element by itself."""

import pytest
import torch
from torch import Tensor

from fastscore.graph.trials.differences import all_close, close

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("rounding", [None, 0.01])
def test_all_is_close_where_each_element_is(dtype: torch.dtype, rounding: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    answers, excused = set(), rounding or 16 * torch.finfo(dtype).eps
    for power in range(-3, 4):
        for _ in range(10):
            before = torch.randn(4, 5, generator=generator).to(dtype)
            x = before + excused * 10.0 ** power * torch.randn(4, 5, generator=generator).to(dtype)
            for scale in (None, before * 100, before[:1]):
                answers.add(all_close(x, before, scale, rounding))
                assert all_close(x, before, scale, rounding) == bool(close(x, before, scale, rounding).all())
    assert answers == {True, False}


@pytest.mark.parametrize(("x", "before"), [
    ([1.0, NAN], [1.0, NAN]), ([1.0, NAN], [1.0, 1.0]), ([1.0, 1.0], [1.0, NAN]), ([INF, 1.0], [INF, 1.0]),
    ([INF, 2.0], [INF, 1.0]), ([INF, 1.0], [-INF, 1.0]), ([1.0, 1.0], [INF, 1.0]), ([0.0, -0.0], [-0.0, 0.0]),
    ([INF, 1.0], [1.0, 1.0]), ([3e38, 1.0], [-3e38, 1.0]), ([5.0, NAN], [1.0, NAN]), ([1.0, 0.0], [0.0, 0.0]),
    ([], [])])
def test_numbers_that_are_none_are_close_to_themselves(x: list[float], before: list[float]) -> None:
    one, other = torch.tensor(x), torch.tensor(before)
    assert all_close(one, other) == bool(close(one, other).all())


@pytest.mark.parametrize("x", [torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [2.0]])])
def test_scales_may_be_of_another_shape(x: Tensor) -> None:
    assert all_close(x + 0.5, x, torch.tensor(100.0), 0.01)
    assert not all_close(x + 0.5, x, x, 0.01)
