# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""normalize_gradient: a gradient scaled to length 1 per sample, and the lengths.

Squares are summed in float64, so neither tiny nor huge gradients lose their length. A sample that fits into registers
is read once; a longer one is read twice, first for its length.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastscore.ops import checks
from fastscore.ops.reference import result_dtype
from fastscore.ops.triton.common import Launch, Step, keep, multiprocessors, offsets
from fastscore.ops.triton.launch import NormalizeLaunch, plan_normalize_gradient


@triton.jit
def load_part(g, sizes, g_strides, length, n, split, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Elements split·BLOCK to (split + 1)·BLOCK - 1 of sample n, their positions, and which of them exist."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    p = split.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = p < length // ALIGN[0] * ALIGN[0]
    g += tl.multiple_of(n * g_strides[0], tl.constexpr(ALIGN[1][0]))
    return tl.load(g + offsets(p, sizes, g_strides[1:], ALIGN[1][1]), mask, other=0.0), p, mask


@triton.jit
def power_of_two(exponent):
    """2 to a power in the range of normal float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def square_length(part):
    """Σ x² in float64: of elements over a power of two near the largest, so that none overflows or vanishes. Few
    devices are fast at float64, so that it is for scalars alone."""
    if part.dtype == tl.float64:
        return tl.sum(part * part)
    wide = part.to(tl.float32)
    largest = tl.max(tl.abs(wide))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    wide *= power_of_two(-exponent)
    scale = power_of_two(exponent).to(tl.float64)
    return tl.sum(wide * wide).to(tl.float64) * scale * scale


@triton.jit
def scaled(part, factor):
    """part · factor (float64), in part's dtype: by two powers of two, which take no digit from a result in the normal
    range, and a number from 1 to 2, in two parts, so that a product is rounded once."""
    if part.dtype == tl.float64:
        return part * factor
    exponent = ((factor.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -200), 200)
    exponent = tl.where(factor > 0, exponent, 0)  # 0 and NaN
    first, second = power_of_two(exponent // 2), power_of_two(exponent - exponent // 2)
    exact = factor / (first.to(tl.float64) * second.to(tl.float64))
    rest = exact.to(tl.float32)
    near_one = part.to(tl.float32) * first * second
    return tl.fma(near_one, rest, near_one * (exact - rest.to(tl.float64)).to(tl.float32)).to(part.dtype)


@triton.jit(do_not_specialize=["length", "splits"])
def lengths_kernel(g, partials, sizes, g_strides, length, splits, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
                   WIDE: tl.constexpr):
    """g [N, *sizes] -> squared lengths of the parts of each sample, partials [N, splits]"""
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    part, _, _ = load_part(g, sizes, g_strides, length, n, split, ALIGN, BLOCK, WIDE)
    tl.store(partials + n * splits + split, square_length(part))


@triton.jit(do_not_specialize=["length", "splits"])
def normalize_gradient_kernel(g, partials, unit, lengths, sizes, g_strides, unit_strides, length, splits,
                              eps: tl.float64, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
                              HELD: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """g [N, *sizes] -> unit [N, *sizes], lengths [N]

    HELD: the program holds the whole sample, and its length with it; else the length is in `partials`.
    """
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    part, p, mask = load_part(g, sizes, g_strides, length, n, split, ALIGN, BLOCK, WIDE)
    if HELD:
        squares = square_length(part)
    else:
        total = tl.zeros((BLOCK_SPLITS,), tl.float64)
        for first in range(0, splits, BLOCK_SPLITS):
            parts = first + tl.arange(0, BLOCK_SPLITS)
            total += tl.load(partials + n * splits + parts, parts < splits, other=0.0)
        squares = tl.sum(total)
    norm = tl.sqrt(squares)
    if split == 0:
        tl.store(lengths + n, norm.to(lengths.dtype.element_ty))

    # A divisor of 0, or so small that its inverse is infinite, gives 0; NaN, which compares with nothing, stays NaN.
    divisor = tl.where(norm < eps, eps, norm)
    tiny = divisor < 2.0**-1022
    factor = tl.where(tiny, 0.0, 1.0 / tl.where(tiny, 1.0, divisor))
    unit += tl.multiple_of(n * unit_strides[0], tl.constexpr(ALIGN[2][0]))
    tl.store(unit + offsets(p, sizes, unit_strides[1:], ALIGN[2][1]), scaled(part, factor), mask)


def launch(plan: NormalizeLaunch, device: torch.device, eps: float) -> Launch:
    """Of g, the unit gradient and the lengths."""
    constants = {"ALIGN": plan.align, "BLOCK": plan.block, "WIDE": plan.wide, "num_warps": plan.warps}
    held, lengths, partials = plan.splits == 1, 2, 3
    scale = Step(normalize_gradient_kernel, plan.grid, (0, lengths if held else partials, 1, lengths),
                 (plan.sizes, *plan.strides, plan.length, plan.splits, eps),
                 {**constants, "HELD": held, "BLOCK_SPLITS": 128})
    if held:
        return Launch(device, (scale,))
    measure = Step(lengths_kernel, plan.grid, (0, partials), (plan.sizes, plan.strides[0], plan.length, plan.splits),
                   constants)
    return Launch(device, (measure, scale), ((plan.samples, plan.splits), torch.float64))


_launches: dict[Any, tuple[Launch, torch.dtype]] = {}


def normalize_gradient(g: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """(g / max(‖g‖, eps) per sample, ‖g‖ [N])"""
    key = (eps, g.shape, g.stride(), g.dtype, g.device)
    known, unit = _launches.get(key), torch.empty_like(g)
    if known is None:
        checks.check_gradient(g, eps)
        sums = result_dtype(g.dtype)
        multiprocessors(g.device)
        if g.numel() == 0:
            return unit, g.new_zeros((g.shape[0],), dtype=sums)
        plan = plan_normalize_gradient(tuple(g.shape), g.stride(), unit.stride(), g.element_size())
        known = keep(_launches, key, (launch(plan, g.device, eps), sums))
    lengths = g.new_empty((g.shape[0],), dtype=known[1])
    known[0]((g, unit, lengths))
    return unit, lengths
