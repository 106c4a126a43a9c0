# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""channel_sums, channel_dot and channel_powers: sums over every position of a channel, by one kernel.

The layout is no part of the kernel: a tile is BLOCK_C channels by BLOCK_P positions, and strides say where it lies.
The compiler knows which stride is 1 and orders the threads of each load along it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastscore.ops import checks
from fastscore.ops.reference import result_dtype
from fastscore.ops.triton.common import Launch, Step, keep, multiprocessors, offsets, register_limit
from fastscore.ops.triton.launch import COMBINE_ROWS, COMBINE_SPLITS, ChannelLaunch, plan_channel_sums

SUMS = {"dot": 1, "sums": 3, "powers": 2}


@triton.jit
def accumulate(totals, a, g, REDUCER: tl.constexpr):
    """The reducer policy: how a tile enters the running totals."""
    product = a * g
    if REDUCER == "dot":
        return (totals[0] + product,)
    elif REDUCER == "sums":
        return totals[0] + product, totals[1] + a, totals[2] + g
    else:
        return totals[0] + tl.abs(product), totals[1] + product * product


@triton.jit(do_not_specialize=["channels", "positions", "rows", "tiles"])
def channel_sums_kernel(a, g, out, channels, sizes, positions, a_strides, g_strides, rows, tiles,
                        REDUCER: tl.constexpr, SUMS: tl.constexpr, MEAN: tl.constexpr, ALIGN: tl.constexpr,
                        BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """a, g [N, C, *sizes] -> out [splits, SUMS, N·C]; MEAN: which sum is divided by the positions, or -1.

    Program (i, split) takes BLOCK_C channels of one sample, and `tiles` tiles of their positions.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    SUM: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    # A multiple of ALIGN already: said in a way that lets the compiler merge the masks of a wide load.
    c_mask = c < channels // ALIGN[0][0] * ALIGN[0][0]
    end = positions // ALIGN[0][1] * ALIGN[0][1]

    a += tl.multiple_of(n * a_strides[0], tl.constexpr(ALIGN[1][0]))
    g += tl.multiple_of(n * g_strides[0], tl.constexpr(ALIGN[2][0]))
    a_rows = a + tl.multiple_of(c * a_strides[1], tl.constexpr(ALIGN[1][1]))[:, None]
    g_rows = g + tl.multiple_of(c * g_strides[1], tl.constexpr(ALIGN[2][1]))[:, None]

    totals = (tl.zeros((BLOCK_C, BLOCK_P), SUM),) * SUMS
    start = tl.program_id(1).to(INDEX) * tiles * BLOCK_P
    for first in range(start, tl.minimum(start + tiles * BLOCK_P, end), BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = c_mask[:, None] & (p < end)[None, :]
        a_tile = tl.load(a_rows + offsets(p, sizes, a_strides[2:], ALIGN[1][2])[None, :], mask, other=0.0)
        g_tile = tl.load(g_rows + offsets(p, sizes, g_strides[2:], ALIGN[2][2])[None, :], mask, other=0.0)
        totals = accumulate(totals, a_tile.to(SUM), g_tile.to(SUM), REDUCER)

    out += tl.program_id(1).to(tl.int64) * SUMS * rows + n * channels
    for i in tl.static_range(SUMS):
        total = tl.sum(totals[i], axis=1)
        tl.store(out + i * rows + c, total / positions if i == MEAN else total, c_mask)


@triton.jit(do_not_specialize=["splits", "positions"])
def combine_kernel(partials, out, rows, splits, positions, SUMS: tl.constexpr, MEAN: tl.constexpr,
                   BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """partials [splits, SUMS, rows] -> out [SUMS, rows], always in the same order; MEAN as above."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for i in tl.static_range(SUMS):
        total = tl.zeros((BLOCK_SPLITS, BLOCK_ROWS), out.dtype.element_ty)
        for first in range(0, splits, BLOCK_SPLITS):
            part = (first + tl.arange(0, BLOCK_SPLITS)).to(tl.int64) * SUMS + i
            mask = (part < splits * SUMS)[:, None] & (row < rows)[None, :]
            total += tl.load(partials + (part * rows)[:, None] + row[None, :], mask, other=0.0)
        whole = tl.sum(total, axis=0)
        tl.store(out + i * rows + row, whole / positions if i == MEAN else whole, row < rows)


def launched(plan: ChannelLaunch, device: torch.device, dtype: torch.dtype, sums: int, mean: int, first: Step
             ) -> Launch:
    """The launch of a step that sums into the last of its tensors, and of what adds up the parts where rows are split.

    mean: MEAN of the last step. dtype: of the sums.
    """
    def of(step: Step, mean: int, *tensors: int) -> Step:
        return step._replace(tensors=tensors, options={**step.options, "MEAN": mean})

    *inputs, out = first.tensors
    if plan.splits == 1:
        return Launch(device, (of(first, mean, *first.tensors),))
    combine = Step(combine_kernel, plan.combine_grid, (), (plan.rows, plan.splits, plan.positions),
                   {"SUMS": sums, "BLOCK_ROWS": COMBINE_ROWS, "BLOCK_SPLITS": COMBINE_SPLITS, "num_warps": 1})
    return Launch(device, (of(first, -1, *inputs, out + 1), of(combine, mean, out + 1, out)),
                  ((plan.splits, sums, plan.rows), dtype))


def launch(plan: ChannelLaunch, device: torch.device, dtype: torch.dtype, reducer: str, mean: bool = False) -> Launch:
    """Of a, g and out, [sums, N·C] in memory; dtype: of the activations."""
    return launched(plan, device, result_dtype(dtype), SUMS[reducer], 1 if mean else -1, Step(
        channel_sums_kernel, plan.grid, (0, 1, 2),
        (plan.channels, plan.sizes, plan.positions, *plan.strides, plan.rows, plan.tiles),
        {"REDUCER": reducer, "SUMS": SUMS[reducer], "ALIGN": plan.align, "BLOCK_C": plan.block_c,
         "BLOCK_P": plan.block_p, "WIDE": plan.wide, "num_warps": plan.warps, **register_limit()}))


_launches: dict[Any, tuple[Launch, tuple[int, ...], torch.dtype]] = {}


def _reduce(reducer: str, a: Tensor, g: Tensor, channel_dim: int, mean: bool = False) -> Tensor:
    key = (reducer, channel_dim, mean, a.shape, a.stride(), a.dtype, a.device, g.shape, g.stride(), g.dtype, g.device)
    known = _launches.get(key)
    if known is None:
        checks.check_pair(a, g, channel_dim)
        shape = (*[SUMS[reducer]] * (SUMS[reducer] > 1), a.shape[0], a.shape[channel_dim])
        if a.numel() == 0:
            return a.new_zeros(shape, dtype=result_dtype(a.dtype))
        plan = plan_channel_sums(tuple(a.shape), a.stride(), g.stride(), channel_dim, a.element_size(),
                                 multiprocessors(a.device))
        known = keep(_launches, key, (launch(plan, a.device, a.dtype, reducer, mean), shape, result_dtype(a.dtype)))
    out = a.new_empty(known[1], dtype=known[2])
    known[0]((a, g, out))
    return out


def channel_sums(a: Tensor, g: Tensor, channel_dim: int = 1, mean: bool = False) -> Tensor:
    """[3, N, C]: Σ a·g, Σ a or the mean of a, Σ g."""
    return _reduce("sums", a, g, channel_dim, mean)


def channel_dot(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """Σ a·g, [N, C]."""
    return _reduce("dot", a, g, channel_dim)


def channel_powers(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """[2, N, C]: Σ |a·g|, Σ (a·g)²."""
    return _reduce("powers", a, g, channel_dim)
