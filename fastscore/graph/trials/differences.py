"""Tensors that differ at some channels: made so, and told apart."""

import math

import torch
from torch import Tensor

_ROUNDING = 16  # of the least step of a dtype


def changed(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """A copy of x, strides and all, that differs from it at `index` of `dim`, and nowhere else by a bit."""
    scale, shift = x.new_ones(x.shape[dim]), x.new_full((x.shape[dim],), -0.0)
    index = index.to(x.device)
    sizes = [-1 if at == dim % x.dim() else 1 for at in range(x.dim())]
    scale, shift = (per_channel.index_fill_(0, index, value).view(sizes) for per_channel, value in
                    ((scale, -1.5), (shift, 1.0)))
    return torch.mul(x, scale, out=torch.empty_like(x)).add_(shift)


def differ(x: Tensor, before: Tensor, dim: int, excused: Tensor | None = None) -> bool:
    """Whether x differs from what it was at a position of `dim` that is not excused."""
    if x.shape != before.shape:  # rows that are picked by what the channels hold
        return True
    if not x.numel():
        return False
    if not x.dim():  # a single index, of an Embedding: it has no channels
        return not all_close(x, before) if x.is_floating_point() else not torch.equal(x, before)
    if excused is not None and len(excused) and int(excused.max()) >= x.shape[dim]:
        return True  # no channels lie along this dimension
    if x.layout == torch.strided and x.dtype == before.dtype and torch.equal(x, before):  # quick, and mostly so
        return False
    difference = x - before if x.is_floating_point() else (x != before).byte()
    # not the least bit, as most of it is; NaN is not 0
    unequal = largest_magnitude(difference.movedim(dim, 0).reshape(x.shape[dim], -1), 1) != 0
    if excused is not None:
        unequal[excused.to(unequal.device)] = False
    index = unequal.nonzero().flatten()
    return len(index) > 0 and not all_close(x.index_select(dim, index), before.index_select(dim, index), before)


def largest_magnitude(x: Tensor, dim: int) -> Tensor:
    """x.abs().amax(dim), of a complex x too, in half the time: nothing as large as x is written."""
    return x.abs().amax(dim) if x.is_complex() or x.dtype == torch.uint8 else torch.maximum(x.amax(dim), -x.amin(dim))


def all_close(x: Tensor, before: Tensor, scale: Tensor | None = None, rounding: float | None = None) -> bool:
    """Whether x has the shape of what was before, and close(...) is true of all of it: in a tenth of the time where
    nothing is off by more than what the largest number excuses, or something by more than anything excuses."""
    if x.shape != before.shape:
        return False
    scale = before if scale is None else scale
    if x.dtype == before.dtype == scale.dtype and x.is_floating_point() and x.numel() and scale.numel():
        rounding = _ROUNDING * torch.finfo(before.dtype).eps if rounding is None else rounding
        excused, off = rounding * _largest(scale), _largest(x - before)
        if off <= excused < math.inf:  # not where one is NaN
            return True
        if off > 2 * (excused + rounding * _largest(before)):
            return False
    return bool(close(x, before, scale, rounding).all())


def _largest(x: Tensor) -> float:
    """The largest magnitude in x; NaN where it holds one."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


def close(x: Tensor, before: Tensor, scale: Tensor | None = None, rounding: float | None = None) -> Tensor:
    """Element by element, bool, to `rounding` (of sums in another order) at the scale of `scale` (`before`).

    NaN is close to NaN; whole numbers are what they are.
    """
    if not before.is_floating_point() and not before.is_complex():
        return x == before
    scale = before if scale is None else scale
    largest = float(scale.abs().nan_to_num(0, 0, 0).max()) if scale.numel() else 0.0
    rounding = _ROUNDING * torch.finfo(before.dtype).eps if rounding is None else rounding
    return torch.isclose(x, before, rtol=rounding, atol=rounding * largest, equal_nan=True)
