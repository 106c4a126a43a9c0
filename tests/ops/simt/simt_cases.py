"""Pairs of tensors in every layout that a kernel may meet, each within a margin of NaN."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from shim import MARGIN
from torch import Tensor


class Case(NamedTuple):
    """How to make a and g, and where channel_sums has to send them."""

    layout: str
    make: Callable[[torch.dtype], tuple[Tensor, Tensor]]
    channel_dim: int = 1
    units: int = 1  # multiprocessors of the device; many make short reductions split


def place(shape: Sequence[int], dtype: torch.dtype, order: Sequence[int] | None = None, offset: int = 0) -> Tensor:
    """Normal numbers of a shape, stored with its dimensions in `order` (outermost first), `offset` elements late."""
    order = range(len(shape)) if order is None else order
    stored = [shape[d] for d in order]
    count = torch.Size(stored).numel()
    storage = torch.full((count + offset + 2 * MARGIN,), torch.nan, dtype=dtype)
    inside = storage[MARGIN + offset:MARGIN + offset + count].view(stored)
    inside.copy_(torch.randn(stored, dtype=torch.float64))
    inverse = sorted(range(len(shape)), key=lambda d: order[d])
    return inside.permute(inverse)


def pair(*shape: int, order: Sequence[int] | None = None, order_g: Sequence[int] | None = None, offset: int = 0,
         offset_g: int | None = None) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    """Two dense tensors; g is stored like a unless told otherwise."""

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (place(shape, dtype, order, offset),
                place(shape, dtype, order if order_g is None else order_g, offset if offset_g is None else offset_g))

    return make


def views(make: Callable[[torch.dtype], tuple[Tensor, Tensor]], of_a: Callable[[Tensor], Tensor],
          of_g: Callable[[Tensor], Tensor]) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    """The same pair, seen through views."""
    return lambda dtype: tuple(view(tensor) for view, tensor in zip((of_a, of_g), make(dtype), strict=True))


def _same(x: Tensor) -> Tensor:
    return x


def _crop(x: Tensor) -> Tensor:
    return x[:, :, 1:-1, 1:-2]


CHANNELS_LAST = (0, 2, 3, 1)

CASES = {
    # positions contiguous
    "contiguous": Case("rows", pair(2, 3, 14, 14)),
    "odd": Case("rows", pair(3, 5, 7, 7)),
    "three positions": Case("rows", pair(3, 5, 1, 3)),
    "one channel": Case("rows", pair(2, 1, 9, 9)),
    "sequence": Case("rows", pair(2, 6, 33)),
    "volume": Case("rows", pair(2, 3, 3, 5, 4)),
    "long": Case("rows", pair(1, 2, 70, 71)),
    "long, split": Case("rows", pair(1, 2, 128, 161), units=8),
    "one element late": Case("rows", pair(2, 3, 9, 9, offset=1)),
    "a late": Case("rows", pair(2, 3, 9, 9, offset=1, offset_g=0)),
    "g late, split": Case("rows", pair(1, 1, 130, 200, offset=0, offset_g=3), units=8),
    "positions transposed": Case("rows", pair(2, 4, 5, 6, order=(0, 1, 3, 2))),
    "samples innermost but one": Case("rows", pair(3, 4, 8, 8, order=(1, 0, 2, 3))),
    "channels halved": Case("rows", views(pair(2, 6, 5, 7), lambda x: x[:, ::2], lambda x: x[:, 1::2])),
    # channels contiguous
    "channels_last": Case("columns", pair(3, 16, 7, 7, order=CHANNELS_LAST)),
    "channels_last, many": Case("columns", pair(2, 264, 3, 3, order=CHANNELS_LAST)),
    "channels_last, ragged": Case("columns", pair(2, 7, 5, 5, order=CHANNELS_LAST)),
    "channels_last, one element late": Case("columns", pair(2, 16, 5, 5, order=CHANNELS_LAST, offset=1)),
    "channels_last, g late": Case("columns", pair(2, 16, 5, 5, order=CHANNELS_LAST, offset_g=1)),
    "channels_last, split": Case("columns", pair(1, 24, 40, 41, order=CHANNELS_LAST), units=8),
    "channels_last, ragged, split": Case("columns", pair(1, 3, 40, 41, order=CHANNELS_LAST), units=8),
    "channels_last_3d": Case("columns", pair(2, 8, 2, 3, 5, order=(0, 2, 3, 4, 1))),
    "channels_last, halved": Case("columns", views(pair(2, 32, 5, 5, order=CHANNELS_LAST), lambda x: x[:, :16],
                                                   lambda x: x[:, 16:])),
    "channels_last, wide against narrow": Case("columns", lambda dtype: (
        place((2, 32, 5, 5), dtype, CHANNELS_LAST)[:, :16], place((2, 16, 5, 5), dtype, CHANNELS_LAST))),
    "tokens": Case("columns", pair(2, 17, 24), channel_dim=-1),
    "features": Case("columns", pair(5, 48)),
    "ragged features": Case("columns", pair(5, 10)),
    "few features of many samples": Case("columns", pair(300, 8)),
    "sample innermost but one, tokens": Case("columns", pair(4, 9, 16, order=(1, 0, 2)), channel_dim=2),
    # everything else
    "mixed": Case("strided", pair(2, 8, 6, 7, order_g=CHANNELS_LAST)),
    "mixed, split": Case("strided", pair(1, 5, 30, 31, order_g=CHANNELS_LAST), units=16),
    "mixed, chains at their longest": Case("strided", pair(1, 1, 2, 20000, order=(0, 1, 3, 2), order_g=(0, 1, 2, 3))),
    "cropped": Case("strided", views(pair(2, 3, 8, 9), _crop, _crop)),
    "cropped against dense": Case("strided", lambda dtype: (_crop(place((2, 3, 8, 9), dtype)),
                                                            place((2, 3, 6, 6), dtype))),
    "channel between positions": Case("strided", pair(2, 5, 4, 6), channel_dim=2),
    "every second position": Case("strided", views(pair(2, 3, 20), lambda x: x[..., ::2], lambda x: x[..., 1::2])),
    "g expanded over positions": Case("strided", views(pair(2, 5, 6, 6), _same,
                                                       lambda x: x[:, :, :1, :1].expand(2, 5, 6, 6))),
    "g one number": Case("strided", views(pair(2, 5, 6, 6), _same, lambda x: x[:1, :1, :1, :1].expand(2, 5, 6, 6))),
    "a expanded over samples": Case("rows", views(pair(3, 4, 5, 5), lambda x: x[:1].expand(3, 4, 5, 5), _same)),
    "six dimensions, shuffled": Case("strided", pair(2, 3, 2, 4, 3, 2, order=(3, 0, 5, 2, 1, 4),
                                                     order_g=(0, 4, 1, 3, 2, 5)), channel_dim=3),
    "channel stride 2, one position": Case("strided", views(pair(3, 8), lambda x: x[:, ::2], lambda x: x[:, 1::2])),
    # nothing to add
    "no samples": Case("rows", pair(0, 3, 4, 4)),
    "no channels": Case("rows", pair(2, 0, 4, 4)),
    "no positions": Case("rows", pair(2, 3, 0)),
}
