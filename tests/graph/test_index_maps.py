"""Index maps against the operations themselves: a tensor that holds its own indices is viewed, cut and permuted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastscore.graph.following import index_maps


def positions(indices: Tensor) -> np.ndarray:
    """Channels 0, 1, ... at `indices`, in the form of index_maps, ascending."""
    return np.sort(indices.numpy() << 32 | np.arange(len(indices)))


def pairs(found: np.ndarray) -> set[tuple[int, int]]:
    """(index, channel) of each position."""
    return {(int(at >> 32), int(at & index_maps.CHANNEL)) for at in found}


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], int, list[int]]:
    """A shape, a dimension of it, and another shape of as many elements."""
    before = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dim, after, left = draw(st.integers(0, len(before) - 1)), list[int](), math.prod(before)
    while left > 1 and len(after) < 3:
        after.append(draw(st.sampled_from([size for size in range(1, left + 1) if left % size == 0])))
        left //= after[-1]
    return before, dim, [*after, left]


@given(views())
def test_view_maps_go_where_a_view_puts_each_channel(case: tuple[list[int], int, list[int]]) -> None:
    """And lead back; where no dimension of the result separates the channels there is no map."""
    before, dim, after = case
    channel = torch.arange(before[dim]).view([-1 if at == dim else 1 for at in range(len(before))]).expand(before)
    viewed = channel.reshape(after)
    found = index_maps.view(dim, before, after)
    separate = [at for at in range(len(after)) if all(len(part.unique()) == 1 for part in viewed.unbind(at))]
    if found is None:
        assert not separate or before[dim] == 1
        return
    at, view = found
    expected = {(index, int(part.flatten()[0])) for index, part in enumerate(viewed.unbind(at))}
    assert at in separate
    arrived = view.forward(positions(torch.arange(before[dim])))
    assert pairs(arrived) == expected
    assert (arrived == np.sort(arrived)).all()
    assert pairs(view.inverse(arrived)) == {(c, c) for c in range(before[dim])}
    same = torch.equal(viewed.movedim(at, 0).reshape(after[at], -1)[:, 0], torch.arange(before[dim]))
    assert bool(view) != same


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), st.integers(1, 4))
def test_slices_cut_what_a_slice_cuts(size: int, begin: int, end: int, step: int) -> None:
    """Forward from the whole to the part; inverse, and the inverse of the inverse, back to where each was."""
    whole = torch.arange(size)
    part = whole[begin:end:step]
    cut = index_maps.SliceMap(begin, max(min(end, size), begin), step)
    arrived = cut.forward(positions(whole))
    assert pairs(arrived) == {(index, int(value)) for index, value in enumerate(part)}
    assert pairs(cut.inverse(arrived)) == {(int(value), int(value)) for value in part}
    other = index_maps.Inverse(cut)
    assert pairs(other.forward(arrived)) == pairs(cut.inverse(arrived))
    assert pairs(other.inverse(positions(whole))) == pairs(arrived)


def test_what_is_lost_is_nowhere() -> None:
    """Both ways."""
    lost = index_maps.Lost()
    assert not len(lost.forward(positions(torch.arange(3))))
    assert not len(lost.inverse(positions(torch.arange(3))))


@pytest.mark.parametrize(("operation", "dim", "after"), [
    (lambda x: x.transpose(1, 3), 1, 3), (lambda x: x.transpose(-1, 0), 1, 1), (lambda x: x.permute(0, 2, 3, 1), 1, 3),
    (lambda x: x.permute(-1, 1, 0, 2), 3, 0), (lambda x: x[:, :, 0], 3, 2), (lambda x: x.mean(0), 1, 0),
    (lambda x: x.sum((2, 3)), 1, 1), (lambda x: x.amax(-1), 1, 1), (lambda x: x.unsqueeze(0), 1, 2),
    (lambda x: x.unsqueeze(-1), 3, 3), (lambda x: x[:, :, :1].squeeze(2), 3, 2), (lambda x: x.unbind(2)[0], 3, 2),
    (lambda x: x + torch.ones(2, 1, 1, 1, 1), 1, 2), (lambda x: x * 2, 3, 3), (lambda x: x[:, :, 0, 0].t(), 1, 0),
])
def test_channel_dim_follows_the_channels(operation: object, dim: int, after: int) -> None:
    """Through every operation that moves dimensions without a view of them, by what autograd keeps of it."""
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = operation(x)
    found, nodes = dim, []
    node = y.grad_fn
    while node is not None and "AccumulateGrad" not in node.name():
        nodes.append(node)
        node = node.next_functions[0][0]
    shapes = [tuple(x.shape)] + [index_maps.shape_of(node) for node in reversed(nodes)]
    for before, shape, node in zip(shapes, shapes[1:], reversed(nodes), strict=False):
        found = index_maps.channel_dim(node, found, before, shape)
    assert found == after
    assert y.shape[found] == x.shape[dim]


def test_autograd_tells_shapes_and_dimensions() -> None:
    """shape_of and saved_dims, with negative dimensions counted from the end; () and [] where nothing is kept."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert index_maps.shape_of(x.transpose(-1, 0).grad_fn) == (4, 3, 2)
    assert index_maps.saved_dims(x.transpose(-1, 0).grad_fn, "_saved_dim0", 3) == [2]
    assert index_maps.saved_dims(x.sum((0, -1)).grad_fn, "_saved_dim", 3) == [0, 2]
    assert index_maps.shape_of(None) == ()
    assert index_maps.saved_dims(x.exp().grad_fn, "_saved_dim", 3) == []


@pytest.mark.parametrize("at", [1, 2])
def test_what_is_picked_has_no_channels_where_the_tensor_has_no_dimension(at: int) -> None:
    """As experts' weights that meet all channels of what they weigh, of size 1 there (Switch Transformers)."""
    rows = torch.tensor([2, 0])
    picked = torch.randn(3, 4, requires_grad=True)[rows] if at == 1 else \
        torch.randn(3, 4, 1, requires_grad=True)[rows, rows]
    dims = 2 if at == 1 else 3
    assert [index_maps.looked_up(picked.grad_fn, dim, dims) for dim in range(dims + 2)] == \
        [None] * at + [1] + [None] * 2
