# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""clamp_backward_: a clamp's backward pass and the channel sums of what one of its readers sent back, at once.

Tiles are those of channel_sums. Every element of the gradient is read, and then written, by one program.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastscore.ops import checks
from fastscore.ops.reference import result_dtype
from fastscore.ops.triton.channel_sums import accumulate, combined
from fastscore.ops.triton.common import Call, multiprocessors, offsets, run
from fastscore.ops.triton.launch import REGISTERS, ChannelLaunch, plan_channel_sums


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
    row_offsets = tl.multiple_of(n * strides[0], ALIGN[1][0]) + tl.multiple_of(c * strides[1], ALIGN[1][1])[:, None]

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


def calls(plan: ChannelLaunch, y: Tensor, g: Tensor, rest: Tensor | None, bounds: tuple[float, float], out: Tensor,
          mean: bool = False) -> list[Call]:
    """The launches that write to `g` and fill `out`, [3, N·C] in memory. bounds: as y's dtype has them."""
    constants = {"REST": rest is not None, "ALIGN": plan.align, "BLOCK_C": plan.block_c, "BLOCK_P": plan.block_p,
                 "WIDE": plan.wide, "num_warps": plan.warps, "maxnreg": REGISTERS}

    def first(to: Tensor, mean: int) -> Call:
        return Call(clamp_backward_kernel, plan.grid,
                    (y, g, y if rest is None else rest, to, plan.channels, plan.sizes, plan.positions, plan.strides[0],
                     plan.rows, plan.tiles, *bounds), {**constants, "MEAN": mean})

    return combined(plan, 3, 1 if mean else -1, out, first)


def clamp_backward_(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, mean: bool = False) -> Tensor:
    """[3, N, C] as channel_sums of y and g; the gradient of the clamp's input is in g then."""
    checks.check_clamp(y, g, rest)
    checks.check_same_strides(y, g, rest)
    out = y.new_empty((3, *y.shape[:2]), dtype=result_dtype(y.dtype))
    if y.numel() == 0:
        return out.zero_()
    plan = plan_channel_sums(tuple(y.shape), y.stride(), y.stride(), 1, y.element_size(), multiprocessors(y.device))
    run(calls(plan, y, g, rest, checks.rounded((low, high), y.dtype), out, mean), y.device)
    return out
