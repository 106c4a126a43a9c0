"""Buffers that show what a kernel touched: NaN wherever it should neither read nor write."""

import torch
from torch import Tensor

GUARD = 64


def poisoned(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a tensor of NaN with these strides, the buffer of NaN that it is a view of)"""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = torch.full((extent + 2 * GUARD,), torch.nan, dtype=dtype)
    return buffer.as_strided(shape, strides, GUARD), buffer


def output(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a vector of NaN, the buffer of NaN around it)"""
    return poisoned((size,), (1,), dtype)


def untouched(buffer: Tensor) -> bool:
    """Whether the guards at both ends still hold NaN."""
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())
