"""The bytes that each launch moves, counted from its geometry.

Every program's masked loads and stores are summed over the grid, with the index arithmetic of the kernels. Masks are
products of a range of rows and a range of positions, so the sum factors into one over each. What caches make of it is
not counted: a byte that two programs ask for counts twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastscore.ops.triton.launch import COMBINE_ROWS, COMBINE_SPLITS, ChannelLaunch, NormalizeLaunch, RandomLaunch


class Traffic(NamedTuple):
    """Bytes of one op."""

    inputs: int
    partials: int  # written and read
    outputs: int

    @property
    def total(self) -> int:
        return sum(self)


def blocks(total: int, block: int, start: int = 0, stop: int | None = None) -> Iterator[int]:
    """How many of `total` elements each block of start, start + block, ... below `stop` holds."""
    for first in range(start, total if stop is None else min(stop, total), block):
        yield min(block, total - first)


def channel_sums(plan: ChannelLaunch, sums: int, itemsize: int, sum_size: int) -> Traffic:
    """`sums` results from two tensors of `itemsize` bytes to an element."""
    programs, splits = plan.grid
    row_blocks = list(blocks(plan.channels, plan.block_c))
    rows = programs // len(row_blocks) * sum(row_blocks)
    span = plan.tiles * plan.block_p
    positions = sum(sum(blocks(plan.positions, plan.block_p, split * span, (split + 1) * span))
                    for split in range(splits))
    inputs, stored = 2 * rows * positions * itemsize, sums * rows * splits * sum_size
    if splits == 1:
        return Traffic(inputs, 0, stored)
    combined = [min(COMBINE_ROWS, plan.rows - program * COMBINE_ROWS) for program in range(plan.combine_grid[0])]
    read = sums * sum(combined) * sum(blocks(splits, COMBINE_SPLITS)) * sum_size
    return Traffic(inputs, stored + read, sums * sum(combined) * sum_size)


def random_gradient(plan: RandomLaunch, partials: bool) -> Traffic:
    """With `partials`, a first pass finds the lengths."""
    ids = 8 * plan.grid[0] * (2 if partials else 1)
    written = plan.samples * sum(blocks(plan.classes, 4 * plan.quads)) * 4
    return Traffic(ids, 4 * plan.grid[0] * (1 + plan.splits) if partials else 0, written)


def normalize_gradient(plan: NormalizeLaunch, itemsize: int, sum_size: int) -> Traffic:
    """The gradient is read twice where it has to be split."""
    once = plan.samples * sum(blocks(plan.length, plan.block)) * itemsize
    outputs = once + plan.samples * sum_size
    if plan.splits == 1:
        return Traffic(once, 0, outputs)
    return Traffic(2 * once, 8 * plan.grid[0] * (1 + plan.splits), outputs)
