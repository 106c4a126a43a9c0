"""Every kind of launch that the heuristic has for channel sums, each with its smallest example."""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from fastscore.ops.triton.launch import ChannelLaunch, plan_channel_sums

SMS = 1  # few programs are enough to fill it, so that small examples are not all split

Strides = tuple[int, int, int]


class Case(NamedTuple):
    """a and g [N, C, P], in elements."""

    shape: tuple[int, int, int]
    a: Strides
    g: Strides

    def plan(self, itemsize: int) -> ChannelLaunch:
        return plan_channel_sums(self.shape, self.a, self.g, 1, itemsize, SMS)


class Kind(NamedTuple):
    """What decides which code of the kernel runs."""

    layout: str
    block_c: int
    block_p: int
    several: bool  # programs, other than splits
    loop: bool
    split: bool
    ragged: bool  # the last block of channels or positions is not full


def ragged_axes(plan: ChannelLaunch) -> int:
    return (plan.channels % plan.block_c > 0) + (plan.positions % plan.block_p > 0)


def kind(plan: ChannelLaunch) -> Kind:
    return Kind(plan.layout, plan.block_c, plan.block_p, plan.grid[0] > 1, plan.tiles > 1, plan.splits > 1,
                ragged_axes(plan) > 0)


def strides(shape: tuple[int, int, int]) -> dict[str, tuple[Strides, Strides]]:
    """Of a and g, for each layout."""
    _, c, p = shape
    rows, columns = (c * p, p, 1), (c * p, 1, c)
    return {"rows": (rows, rows), "columns": (columns, columns), "mixed": (rows, columns)}


@lru_cache
def cases(itemsize: int) -> dict[Kind, Case]:
    """An example of every kind of launch: ragged along both axes where it can be, and else the smallest."""
    near = sorted({size for power in range(13) for size in (2**power - 1, 2**power, 2**power + 1) if size > 0})
    tile = 4096 // itemsize
    long = {size for power in range(4, 13) for size in (8 * 2**power, 8 * 2**power + 3) if size <= 8 * tile + 3}
    found: dict[Kind, tuple[tuple[int, int], Case]] = {}
    for channels, positions in product(near, {*near, *long}):
        for samples in (1, 2):
            shape = (samples, channels, positions)
            for a, g in strides(shape).values():
                case = Case(shape, a, g)
                plan = case.plan(itemsize)
                merit = (ragged_axes(plan), -plan.rows * positions)
                if merit > found.get(kind(plan), ((-1, 0), case))[0]:
                    found[kind(plan)] = merit, case
    return {kind: case for kind, (_, case) in found.items()}
