"""Of which sample each row of a tapped tensor is, in one batch: found by sending its gradient back once more.

What comes back to a row is as large as the gradient that was sent, and 2**k times as large, bit for bit, where that is.
So each sample's is sent by another power of 2, a digit of its number in each pass: two passes tell 8 samples apart,
three 64. A row that several samples reach has no such factor.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastscore.modules.sample_axis import MIXED, Owners, Untold
from fastscore.taps.passes import Tapped

_BASE = 8  # factors from 1/16 to 8, which float16 can take
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}  # of the largest in a row, where sums come in any order


def followed(reached: Mapping[int, Tapped], moving: Sequence[Tapped], gradient: Tensor, linear: Sequence[int],
             last: bool, sent: Callable[[Tensor, bool], Mapping[int, Tapped]]) -> dict[int, Tapped]:
    """What a backward pass has brought to gates, by their id, with the sample of each row of those that are moving.

    gradient: [N, ...], what was sent. linear: the parts of what is measured that are as large as that. sent: (gradient,
    whether it is the last) -> what that brings to `moving`.
    """
    apart = [tapped for tapped in moving if id(tapped.gate) in reached]
    numbers = torch.arange(len(gradient), device=gradient.device)
    rows = {id(tapped.gate): _side_by_side(reached[id(tapped.gate)].gate, linear) for tapped in apart}
    owner = {key: torch.zeros(len(each), dtype=torch.int64, device=each.device) for key, each in rows.items()}
    fits = dict.fromkeys(rows, True)
    place = 1
    while apart and place < len(gradient):
        factors = torch.exp2((numbers // place % _BASE - _BASE // 2).to(gradient.dtype))
        scaled = gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
        again = sent(scaled, last and place * _BASE >= len(gradient))
        for key, before in rows.items():
            digit, alike = _digits(before, _side_by_side(again[key].gate, linear))
            owner[key] += place * digit
            fits[key] = fits[key] and alike
        place *= _BASE
    axes = {key: Owners(each) if fits[key] and bool((each < len(gradient)).all()) else
            Untold(MIXED.format(reached[key].layer)) for key, each in owner.items()}
    return {key: tapped._replace(axis=axes.get(key, tapped.axis)) for key, tapped in reached.items()}


def _side_by_side(measured: Tensor, parts: Sequence[int]) -> Tensor:
    """[P, R, C] -> [R, some of P * C]."""
    return measured[list(parts)].transpose(0, 1).flatten(1)


def _digits(before: Tensor, after: Tensor) -> tuple[Tensor, bool]:
    """By which factor each row has become larger, from 0, and whether all of it has; NaN and infinity are no matter of
    factors."""
    if not before.numel():
        return torch.zeros(len(before), dtype=torch.int64, device=before.device), True
    largest, where = before.abs().max(1, keepdim=True)
    power = (after.gather(1, where) / before.gather(1, where)).log2().round().nan_to_num(-_BASE // 2)
    power = power.clamp(-_BASE // 2, _BASE // 2 - 1)
    factor = power.exp2()
    off = (after - before * factor).abs() > _ROUNDING[before.dtype] * largest * factor
    return (power.squeeze(1) + _BASE // 2).long(), not bool(off.any())
