"""How every Triton kernel is launched, from shapes, strides and the number of multiprocessors alone.

A tile is what one program holds at a time: BLOCK_C channels by BLOCK_P positions, 128 threads with two 16-byte loads
of each tensor. Its shape follows the layout, so that neighbouring threads read neighbouring addresses:

    rows      positions contiguous       tiles as long as the rows, several short rows to a tile
    columns   channels contiguous        128 bytes of channels, the rest of the tile along the positions
    mixed     one of each, or neither    32 channels, so that whole sectors of both tensors are read

Where rows are few and long, they are split; the parts land in a buffer and are added in order by a second kernel.
Everything here is plain Python: no autotuning, and the same arguments give the same launch.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Layout = Literal["rows", "columns", "mixed"]

LOAD_BYTES = 16
LOADS_PER_THREAD = 2
WARPS = 4
COLUMN_BYTES = 128
MIXED_CHANNELS = 32
PROGRAMS_PER_SM = 4  # 16 warps on each multiprocessor keep enough bytes in flight
REGISTERS = 65536 // (PROGRAMS_PER_SM * WARPS * 32)  # of a thread, so that they are all resident
TILES_PER_SPLIT = 4  # a shorter split costs more in its second kernel than it gains
COMBINE_ROWS, COMBINE_SPLITS = 32, 32
QUADS_PER_PROGRAM = 1024
NORMALIZE_BLOCK = 8192


def power_of_two_from(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_divide(n: int, d: int) -> int:
    return -(-n // d)


def alignment(stride: int, itemsize: int) -> int:
    """The largest power of two that divides `stride`, up to the elements of one load."""
    most = LOAD_BYTES // itemsize
    return math.gcd(stride, most) if stride else most


def merge(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The same elements in as few dimensions as all tensors allow, the first tensor's longest stride first.

    Returns the sizes and then each tensor's strides; at least one dimension remains.
    """
    dims = [d for d in range(len(sizes)) if sizes[d] != 1]
    dims.sort(key=lambda d: tuple(abs(stride[d]) for stride in strides), reverse=True)
    merged: list[list[int]] = []  # [size, stride, stride, ...]
    for d in dims:
        inner = [sizes[d], *(stride[d] for stride in strides)]
        if merged and all(outer == step * sizes[d] for outer, step in zip(merged[-1][1:], inner[1:], strict=True)):
            merged[-1] = [merged[-1][0] * sizes[d], *inner[1:]]
        else:
            merged.append(inner)
    return tuple(zip(*merged, strict=True)) if merged else ((1,), *((0,) for _ in strides))


@dataclass(frozen=True)
class ChannelLaunch:
    """Launch of `channel_sums_kernel`, and of `combine_kernel` where `splits` > 1."""

    layout: Layout
    samples: int
    channels: int
    sizes: tuple[int, ...]  # of the position dimensions
    strides: tuple[tuple[int, ...], tuple[int, ...]]  # of a and g: sample, channel, position dimensions
    align: tuple[tuple[int, int], tuple[int, int, int], tuple[int, int, int]]  # channels and positions; strides
    block_c: int
    block_p: int
    tiles: int  # of one split
    splits: int
    warps: int

    @property
    def positions(self) -> int:
        return math.prod(self.sizes)

    @property
    def rows(self) -> int:
        """Sums to be made: N·C, however samples and channels were merged."""
        return self.samples * self.channels

    @property
    def wide(self) -> bool:
        """Whether positions need 64-bit indices."""
        return self.positions + self.block_p >= 2**31

    @property
    def grid(self) -> tuple[int, int]:
        return self.samples * ceil_divide(self.channels, self.block_c), self.splits

    @property
    def combine_grid(self) -> tuple[int, ...]:
        return (ceil_divide(self.rows, COMBINE_ROWS),)


def _fast_axis(channel_stride: int, position_stride: int) -> str | None:
    """Along which axis a tensor's neighbours are neighbours in memory; None if it makes no difference."""
    if position_stride == 0 or channel_stride == position_stride:
        return None
    return "p" if channel_stride == 0 or abs(position_stride) < abs(channel_stride) else "c"


def _layout(channels: int, positions: int, a: tuple[int, ...], g: tuple[int, ...]) -> Layout:
    if positions == 1:
        return "columns"
    if channels == 1:
        return "rows"
    axes = {_fast_axis(stride[1], stride[-1]) for stride in (a, g)} - {None}
    return "mixed" if len(axes) == 2 else "columns" if axes == {"c"} else "rows"


def _tile(layout: Layout, channels: int, positions: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P)"""
    tile = WARPS * 32 * LOADS_PER_THREAD * LOAD_BYTES // itemsize
    all_c, all_p = power_of_two_from(channels), power_of_two_from(positions)
    if layout == "rows":
        block_p = min(all_p, tile)
    else:
        block_c = min(all_c, MIXED_CHANNELS if layout == "mixed" else COLUMN_BYTES // itemsize)
        block_p = min(all_p, tile // block_c)
    return min(all_c, tile // block_p), block_p


@lru_cache(maxsize=4096)
def plan_channel_sums(shape: tuple[int, ...], a_strides: tuple[int, ...], g_strides: tuple[int, ...], channel_dim: int,
                      itemsize: int, sms: int) -> ChannelLaunch:
    """Launch for tensors of `shape` and these strides, none empty, on a device with `sms` multiprocessors."""
    channel_dim %= len(shape)
    rest = [d for d in range(1, len(shape)) if d != channel_dim]
    sizes, a_inner, g_inner = merge(tuple(shape[d] for d in rest), tuple(a_strides[d] for d in rest),
                                    tuple(g_strides[d] for d in rest))
    samples, channels = shape[0], shape[channel_dim]
    a, g = (a_strides[0], a_strides[channel_dim]), (g_strides[0], g_strides[channel_dim])
    if samples == 1 or channels == 1 or (a[0] == channels * a[1] and g[0] == channels * g[1]):
        # One run of rows: nothing tells samples from channels.
        a, g = ((0, x[0 if channels == 1 else 1]) for x in (a, g))
        samples, channels = 1, samples * channels
    if channels == 1:
        a, g = (a[0], 0), (g[0], 0)

    strides = (a + a_inner, g + g_inner)
    positions = math.prod(sizes)
    layout = _layout(channels, positions, *strides)
    block_c, block_p = _tile(layout, channels, positions, itemsize)

    tiles, programs = ceil_divide(positions, block_p), samples * ceil_divide(channels, block_c)
    splits = max(1, min(sms * PROGRAMS_PER_SM // programs, tiles // TILES_PER_SPLIT))
    tiles_per_split = ceil_divide(tiles, splits)

    align = tuple((alignment(s[0], itemsize), alignment(s[1], itemsize),
                   min(alignment(p, itemsize) for p in s[2:])) for s in strides)
    threads = block_c * block_p * itemsize // (LOADS_PER_THREAD * LOAD_BYTES)
    return ChannelLaunch(layout, samples, channels, sizes, strides,
                         ((alignment(channels, itemsize), alignment(positions, itemsize)), align[0], align[1]),
                         block_c, block_p, tiles_per_split, ceil_divide(tiles, tiles_per_split),
                         max(1, min(WARPS, threads // 32)))


@dataclass(frozen=True)
class RandomLaunch:
    """Launch of `random_gradient_kernel`, and of `random_lengths_kernel` where `splits` > 1."""

    samples: int
    classes: int
    quads: int  # blocks of four classes that one program makes: a power of two
    splits: int

    @property
    def align(self) -> int:
        return math.gcd(self.classes, 4)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.samples * self.splits,)

    @property
    def warps(self) -> int:
        return max(1, min(WARPS, self.quads // 32))


def plan_random_gradient(samples: int, classes: int) -> RandomLaunch:
    """A program to a sample where its gradient fits, else a program to every 4096 classes of it."""
    quads = ceil_divide(classes, 4)
    held = min(power_of_two_from(quads), QUADS_PER_PROGRAM)
    return RandomLaunch(samples, classes, held, ceil_divide(quads, held))


@dataclass(frozen=True)
class NormalizeLaunch:
    """Launch of `normalize_gradient_kernel`, and of `lengths_kernel` where `splits` > 1."""

    samples: int
    sizes: tuple[int, ...]  # of one sample
    strides: tuple[tuple[int, ...], tuple[int, ...]]  # of the gradient and the result: sample, then dimensions
    align: tuple[int, tuple[int, int], tuple[int, int]]  # length; strides
    block: int
    splits: int
    warps: int

    @property
    def length(self) -> int:
        return math.prod(self.sizes)

    @property
    def wide(self) -> bool:
        return self.length + self.block >= 2**31

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.samples * self.splits,)


@lru_cache(maxsize=4096)
def plan_normalize_gradient(shape: tuple[int, ...], g_strides: tuple[int, ...], unit_strides: tuple[int, ...],
                            itemsize: int) -> NormalizeLaunch:
    """A program to a sample where it fits into registers, else a program to every 8192 elements of it, twice."""
    sizes, g_inner, unit_inner = merge(shape[1:], g_strides[1:], unit_strides[1:])
    length = math.prod(sizes)
    block = min(power_of_two_from(length), NORMALIZE_BLOCK)
    strides = ((g_strides[0], *g_inner), (unit_strides[0], *unit_inner))
    align = tuple((alignment(s[0], itemsize), min(alignment(x, itemsize) for x in s[1:])) for s in strides)
    return NormalizeLaunch(shape[0], sizes, strides, (alignment(length, itemsize), align[0], align[1]), block,
                           ceil_divide(length, block), max(1, min(2 * WARPS, block // 512)))
