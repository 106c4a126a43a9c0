# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""clamp_backward_: a clamp's backward pass and the channel sums of what one of its readers sent back, at once.

Tiles are those of channel_sums. Every element of the gradient is read, and then written, by one program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastscore.ops import checks
from fastscore.ops.reference import result_dtype
from fastscore.ops.triton.channel_sums import accumulate, launched
from fastscore.ops.triton.common import Launch, Step, keep, multiprocessors, offsets, register_limit
from fastscore.ops.triton.launch import ChannelLaunch, plan_channel_sums


@triton.jit(do_not_specialize=["channels", "positions", "rows", "tiles"])
def clamp_backward_kernel(y, g, rest, out, channels, sizes, positions, strides, rows, tiles, low: tl.float64,
                          high: tl.float64, REST: tl.constexpr, MEAN: tl.constexpr, ALIGN: tl.constexpr,
                          BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """y, g and, if REST, rest [N, C, *sizes], all of the same strides -> g, and out [splits, 3, N·C]

    MEAN: as in channel_sums_kernel.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    SUM: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels // ALIGN[0][0] * ALIGN[0][0]
    end = positions // ALIGN[0][1] * ALIGN[0][1]
    row_offsets = tl.multiple_of(n * strides[0], tl.constexpr(ALIGN[1][0])) \
        + tl.multiple_of(c * strides[1], tl.constexpr(ALIGN[1][1]))[:, None]

    totals = (tl.zeros((BLOCK_C, BLOCK_P), SUM),) * 3
    start = tl.program_id(1).to(INDEX) * tiles * BLOCK_P
    for first in range(start, tl.minimum(start + tiles * BLOCK_P, end), BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = c_mask[:, None] & (p < end)[None, :]
        at = row_offsets + offsets(p, sizes, strides[2:], ALIGN[1][2])[None, :]
        clamped = tl.load(y + at, mask, other=0.0).to(SUM)
        gradient = tl.load(g + at, mask, other=0.0).to(SUM)
        totals = accumulate(totals, clamped, gradient, "sums")
        if REST:
            gradient += tl.load(rest + at, mask, other=0.0).to(SUM)
        outside = (clamped <= tl.full((1, 1), low, SUM)) | (clamped >= tl.full((1, 1), high, SUM))
        tl.store(g + at, tl.where(outside, 0.0, gradient).to(g.dtype.element_ty), mask)

    out += tl.program_id(1).to(tl.int64) * 3 * rows + n * channels
    for i in tl.static_range(3):
        total = tl.sum(totals[i], axis=1)
        tl.store(out + i * rows + c, total / positions if i == MEAN else total, c_mask)


def launch(plan: ChannelLaunch, device: torch.device, dtype: torch.dtype, rest: bool, bounds: tuple[float, float],
           mean: bool = False) -> Launch:
    """Of y, g, the rest (or y), and out, [3, N·C] in memory. dtype: of y. bounds: as it has them."""
    return launched(plan, device, result_dtype(dtype), 3, 1 if mean else -1, Step(
        clamp_backward_kernel, plan.grid, (0, 1, 2, 3),
        (plan.channels, plan.sizes, plan.positions, plan.strides[0], plan.rows, plan.tiles, *bounds),
        {"REST": rest, "ALIGN": plan.align, "BLOCK_C": plan.block_c, "BLOCK_P": plan.block_p, "WIDE": plan.wide,
         "num_warps": plan.warps, **register_limit()}))


_launches: dict[Any, tuple[Launch, tuple[int, ...], torch.dtype]] = {}


def clamp_backward_(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, mean: bool = False) -> Tensor:
    """[3, N, C] as channel_sums of y and g; the gradient of the clamp's input is in g then."""
    key = (low, high, mean, y.shape, y.stride(), y.dtype, y.device, g.shape, g.stride(), g.dtype, g.device,
           rest if rest is None else (rest.shape, rest.stride(), rest.dtype, rest.device))
    known = _launches.get(key)
    if known is None:
        checks.check_clamp(y, g, rest)
        checks.check_same_strides(y, g, rest)
        shape, dtype = (3, *y.shape[:2]), result_dtype(y.dtype)
        if y.numel() == 0:
            return y.new_zeros(shape, dtype=dtype)
        plan = plan_channel_sums(tuple(y.shape), y.stride(), y.stride(), 1, y.element_size(), multiprocessors(y.device))
        bounds = checks.rounded((low, high), y.dtype)
        known = keep(_launches, key, (launch(plan, y.device, y.dtype, rest is not None, bounds, mean), shape, dtype))
    out = y.new_empty(known[1], dtype=known[2])
    known[0]((y, g, y if rest is None else rest, out))
    return out
