"""The launch heuristic: every element in one tile of one program, and the choices that make it fast."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.ops.triton.launch import (
    LOAD_BYTES,
    LOADS_PER_THREAD,
    NORMALIZE_BLOCK,
    PROGRAMS_PER_SM,
    TILES_PER_SPLIT,
    ChannelLaunch,
    alignment,
    merge,
    plan_channel_sums,
    plan_normalize_gradient,
    plan_random_gradient,
)

SMS = 132


def plan(x: torch.Tensor, y: torch.Tensor | None = None, channel_dim: int = 1, sms: int = SMS) -> ChannelLaunch:
    y = x if y is None else y
    return plan_channel_sums(tuple(x.shape), x.stride(), y.stride(), channel_dim, x.element_size(), sms)


def meta(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if last else x


def visited(it: ChannelLaunch, of: int) -> list[int]:
    """Addresses of every element that the programs load from a (of=0) or g (of=1), in the kernel's own arithmetic."""
    sample, channel, *position = it.strides[of]
    programs, splits = it.grid
    blocks = programs // it.samples
    addresses = []
    for program, split in itertools.product(range(programs), range(splits)):
        n, start = program // blocks, split * it.tiles * it.block_p
        channels = range(program % blocks * it.block_c, min((program % blocks + 1) * it.block_c, it.channels))
        positions = range(start, min(start + it.tiles * it.block_p, it.positions))
        for c, p in itertools.product(channels, positions):
            index = []
            for size in it.sizes[:0:-1]:
                p, inner = divmod(p, size)
                index.insert(0, inner)
            walked = sum(i * stride for i, stride in zip([p, *index], position, strict=True))
            addresses.append(n * sample + c * channel + walked)
    return addresses


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_element_is_loaded_once(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(2)]
    a, g = (torch.empty([shape[d] for d in order]).permute(*map(order.index, range(len(shape)))) for order in orders)
    expanded = data.draw(st.integers(0, len(shape) - 1))
    g = g.narrow(expanded, 0, 1).expand(shape) if data.draw(st.booleans()) else g
    it = plan(a, g, data.draw(st.integers(1, len(shape) - 1)), data.draw(st.sampled_from([1, SMS])))
    assert sorted(visited(it, 0)) == list(range(a.numel()))
    assert sorted(visited(it, 1)) == sorted(
        sum(i * stride for i, stride in zip(index, g.stride(), strict=True))
        for index in itertools.product(*map(range, shape)))


def test_every_element_of_a_split_is_loaded_once():
    it = plan(torch.empty(1, 3, 90, 91))
    assert it.splits > 1
    assert sorted(visited(it, 0)) == list(range(3 * 90 * 91))


@pytest.mark.parametrize(("tensors", "layout", "samples", "channels", "sizes"), [
    ((meta(8, 64, 56, 56),), "rows", 1, 512, (3136,)),
    ((meta(8, 64, 56, 56, last=True),), "columns", 8, 64, (3136,)),
    ((meta(8, 64, 56, 56), meta(8, 64, 56, 56, last=True)), "mixed", 8, 64, (3136,)),
    ((meta(8, 64, 56, 56), meta(8, 64, 1, 1).expand(8, 64, 56, 56)), "rows", 1, 512, (3136,)),
    ((meta(8, 64),), "columns", 1, 512, (1,)),
    ((meta(8, 64, 1, 1, last=True), meta(8, 64, 1, 1)), "columns", 1, 512, (1,)),
    ((meta(8, 64, 58, 58)[:, :, 1:-1, 1:-1],), "rows", 1, 512, (56, 56)),
    ((meta(8, 1, 56, 56),), "rows", 1, 8, (3136,)),
    ((meta(8, 64, 4, 5, 6),), "rows", 1, 512, (120,)),
])
def test_layouts(tensors, layout, samples, channels, sizes):
    it = plan(*tensors)
    assert (it.layout, it.samples, it.channels, it.sizes) == (layout, samples, channels, sizes)


def test_channels_in_the_last_dimension_are_columns():
    it = plan(meta(32, 197, 768), channel_dim=-1)
    assert (it.layout, it.samples, it.channels, it.sizes) == ("columns", 32, 768, (197,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
def test_a_thread_holds_two_loads_of_each_tensor(last, dtype):
    it = plan(meta(64, 256, 56, 56, dtype=dtype, last=last))
    assert it.block_c * it.block_p * dtype.itemsize == it.warps * 32 * LOAD_BYTES * LOADS_PER_THREAD
    contiguous = it.block_c if last else it.block_p
    assert contiguous * dtype.itemsize >= 128  # a whole cache line


@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
def test_few_long_rows_are_split_and_many_are_not(last):
    few, many = plan(meta(1, 64, 112, 112, last=last)), plan(meta(256, 64, 112, 112, last=last))
    assert many.splits == 1
    assert few.splits > 1
    assert few.tiles >= TILES_PER_SPLIT
    assert math.prod(few.grid) <= SMS * PROGRAMS_PER_SM
    assert few.splits * few.tiles * few.block_p >= 112 * 112 > (few.splits - 1) * few.tiles * few.block_p


def test_the_number_of_multiprocessors_decides_how_far_rows_are_split():
    splits = [plan(meta(1, 64, 112, 112, last=True), sms=sms).splits for sms in (1, 8, 64, 132)]
    assert splits == sorted(splits)
    assert splits[0] < splits[-1]


@pytest.mark.parametrize(("stride", "itemsize", "elements"), [
    (3136, 4, 4), (196, 4, 4), (196, 2, 4), (49, 4, 1), (0, 2, 8), (8, 2, 8), (6, 8, 2), (2**40, 2, 8),
])
def test_alignment(stride, itemsize, elements):
    assert alignment(stride, itemsize) == elements


def test_merge_keeps_what_cannot_be_merged():
    assert merge((4, 1, 6), (12, 5, 2), (6, 9, 1)) == ((24,), (2,), (1,))
    assert merge((4, 6), (6, 1), (1, 4)) == ((4, 6), (6, 1), (1, 4))
    assert merge((4, 6), (1, 4), (1, 4)) == ((24,), (1,), (1,))
    assert merge((), (), ()) == ((1,), (0,), (0,))


def test_more_than_2_to_the_31_positions_are_wide():
    assert plan(meta(1, 2, 2**32)).wide
    assert not plan(meta(2, 2**20, 2**20)).wide
    assert plan_normalize_gradient((1, 2**32), (2**32, 1), (2**32, 1), 4).wide


@pytest.mark.parametrize(("classes", "quads", "splits"), [(1, 1, 1), (10, 4, 1), (1000, 256, 1), (4096, 1024, 1),
                                                         (4097, 1024, 2), (50257, 1024, 13)])
def test_random_gradient(classes, quads, splits):
    it = plan_random_gradient(8, classes)
    assert (it.quads, it.splits, it.grid) == (quads, splits, (8 * splits,))
    assert 4 * quads * splits >= classes > 4 * quads * (splits - 1)


@pytest.mark.parametrize(("length", "splits"), [(1, 1), (1000, 1), (NORMALIZE_BLOCK, 1), (NORMALIZE_BLOCK + 1, 2)])
def test_normalize_gradient(length, splits):
    it = plan_normalize_gradient((8, length), (length, 1), (length, 1), 4)
    assert (it.splits, it.grid) == (splits, (8 * splits,))
    assert it.block * splits >= length
