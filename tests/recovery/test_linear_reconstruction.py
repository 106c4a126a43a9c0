"""Linear reconstruction against what is known in closed form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup, Member
from fastscore.recovery.linear import estimate_inputs, rewired
from fastscore.recovery.moments import WIDEST, InputMoments, Moments, layouts, rows_of

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A Linear or a convolution of any kind, and the shape of an input of it."""
    dims, groups = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3]))
    if dims == 0:
        return nn.Linear(8, 3, bias=draw(st.booleans())), (60, *[3] * draw(st.integers(0, 2)), 8)
    transposed = draw(st.booleans())
    stride = draw(st.integers(1, 2))
    options: dict[str, Any] = {"stride": stride, "padding": draw(st.integers(0, 2)), "groups": groups,
                               "dilation": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    make = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    samples = 60 // 6 ** (dims - 1) + 3
    return make(4 * groups, 3 * groups, draw(st.integers(1, 3)), **options), (samples, 4 * groups, *[6] * dims)


def moments_of(layer: nn.Module, x: Tensor, limit: int = 10**9) -> Moments:
    (index,) = layouts(nn.Sequential(layer), (), ["0"]).values()
    moments = Moments(index)
    for part in x.split(16):
        moments.add(rows_of(layer, part, limit=limit))
    return moments


@QUICK
@given(layers(), st.integers(0, 2**31))
def test_a_channel_that_is_a_linear_function_of_others_is_not_missed(case: tuple[nn.Module, tuple[int, ...]],
                                                                      seed: int) -> None:
    """In every block of a grouped layer the last channel is one; without a constant, padding changes nothing."""
    layer, shape = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    along = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    blocks = along.unflatten(-1, (getattr(layer, "groups", 1), -1))
    blocks[..., -1] = blocks[..., :-1] @ torch.randn(blocks.shape[-1] - 1, generator=generator)
    removed = torch.arange(along.shape[-1]).reshape(blocks.shape[-2:])[:, -1]
    found = estimate_inputs(moments_of(layer, x), removed, 0.0)
    assert not found.mixing[..., -1].any()
    with torch.no_grad():
        before = layer(x)
        layer.weight.copy_(rewired(layer, found))
        along[..., removed] = 0
        after = layer(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


@QUICK
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-3, 0.1, 10.0]), st.integers(1, 6))
def test_the_ridge_solution_is_numpy_s(seed: int, ridge: float, count: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(200, 8)) @ generator.normal(size=(8, 8)) + generator.normal(size=8) * 10
    removed = np.sort(generator.permutation(8)[:count])
    kept = np.setdiff1d(np.arange(8), removed)
    centred = x - x.mean(0)
    gram = centred[:, kept].T @ centred[:, kept]
    gram += ridge * np.diag(np.diag(gram))
    mixing = np.linalg.solve(gram, centred[:, kept].T @ centred[:, removed]).T
    constant = x.mean(0)[removed] - mixing @ x.mean(0)[kept]
    moments = Moments(torch.arange(8).reshape(1, 1, 8))
    moments.add(torch.from_numpy(x))
    found = estimate_inputs(moments, torch.from_numpy(removed), ridge)
    torch.testing.assert_close(found.mixing[0][removed][:, kept], torch.from_numpy(mixing), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.constant[removed], torch.from_numpy(constant), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(found.mixing[0][kept][:, kept], torch.eye(len(kept), dtype=torch.float64))
    assert not found.constant[kept].any()
    assert not found.mixing[0][:, removed].any()


@pytest.mark.parametrize("samples", [2, 4, 9])
def test_fewer_samples_than_channels_dead_and_constant_channels(samples: int) -> None:
    """Whatever is not known is replaced by its mean, and nothing grows without bounds."""
    x = torch.randn(samples, 12, generator=torch.Generator().manual_seed(0))
    x[:, 3], x[:, 4], x[:, 7] = 0, 5, 1e-3
    moments = Moments(torch.arange(12).reshape(1, 1, 12))
    moments.add(x)
    for ridge in (0.0, 1e-2, math.inf):
        found = estimate_inputs(moments, torch.tensor([2, 3, 4]), ridge)
        assert torch.isfinite(found.mixing).all()
        assert found.mixing.abs().max() < 100
        assert float(found.constant[3].abs()) < 1e-6
        assert abs(float(found.constant[4]) - 5) < 1e-5
        assert not found.mixing[0][:, 7][torch.arange(12) != 7].any()  # what never varies predicts nothing
        exact = x.double() @ found.mixing[0].T + found.constant
        if ridge == 0 and samples < 9:  # as many unknowns as samples: all of them are met
            torch.testing.assert_close(exact[:, 2], x[:, 2].double(), rtol=1e-3, atol=1e-3)
        if ridge == math.inf:
            torch.testing.assert_close(exact[:, 2], x[:, 2].double().mean().expand(samples), rtol=1e-6, atol=1e-6)


def test_a_whole_block_that_goes_is_replaced_by_its_mean() -> None:
    layer, x = nn.Conv2d(8, 4, 3, groups=2), torch.randn(3, 8, 5, 5)
    found = estimate_inputs(moments_of(layer, x), torch.tensor([0, 1, 2, 3, 6]), 1e-3)
    torch.testing.assert_close(found.constant[:4], x.double().mean((0, 2, 3))[:4], rtol=1e-6, atol=1e-6)
    assert not found.mixing[0].any()
    assert found.mixing[1][2].any()


def test_places_of_a_flattened_channel_share_their_moments_and_have_a_mean_each() -> None:
    every = torch.arange(12)
    group = ChannelGroup("conv", 3, torch.arange(3), (Member("0", "consumer", every, every // 4),))
    layer = nn.Linear(12, 2)
    (index,) = layouts(nn.Sequential(layer), [group], ["0"]).values()
    assert index.tolist() == [[[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]]
    x = torch.randn(50, 3, 4)
    x[:, 2] = 2 * x[:, 0] - x[:, 1] + torch.arange(4.0)  # a constant of its own at every place
    moments = Moments(index)
    moments.add(x.flatten(1))
    found = estimate_inputs(moments, torch.tensor([8, 9, 10, 11]), 0.0)
    torch.testing.assert_close(found.constant[8:], torch.arange(4.0).double(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = layer(x.flatten(1))
        layer.bias += (layer.weight.double() @ found.constant).float()
        layer.weight.copy_(rewired(layer, found))
        x[:, 2] = 0
        torch.testing.assert_close(layer(x.flatten(1)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only some places"):
        estimate_inputs(moments, torch.tensor([8, 9]), 0.0)


def test_a_layer_that_reads_too_much_at_once_has_means_alone() -> None:
    layer = nn.Linear(WIDEST + 1, 1)
    (index,) = layouts(nn.Sequential(layer), (), ["0"]).values()
    moments = Moments(index)
    moments.add(torch.arange(2.0)[:, None].expand(2, WIDEST + 1))
    found = estimate_inputs(moments, torch.tensor([5]), 0.0)
    assert found.mixing.numel() == WIDEST + 1
    assert float(found.constant[5]) == 0.5
    assert found.constant.count_nonzero() == 1


# Moments

@QUICK
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(0, 2**31), st.sampled_from([1, 2, 3]))
def test_moments_do_not_depend_on_batches_or_their_order_and_lose_nothing_to_a_large_mean(
        sizes: list[int], seed: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 6, generator=generator) + 1000 * torch.randn(6, generator=generator)
    whole, parts = (Moments(torch.arange(6).reshape(blocks, 1, -1)) for _ in range(2))
    whole.add(x.double())
    for part in reversed(x.split(sizes)):
        parts.add(part)
    assert parts.count == whole.count == sum(sizes)
    exact = np.cov(x.double().numpy().T, bias=True).reshape(6, 6) if len(x) else np.zeros((6, 6))
    for block, (a, b) in enumerate(zip(parts.covariance, whole.covariance, strict=True)):
        at = slice(block * 6 // blocks, (block + 1) * 6 // blocks)
        torch.testing.assert_close(b, torch.from_numpy(exact[at, at]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.mean.flatten(), x.double().mean(0) if len(x) else torch.zeros(6).double(),
                               rtol=1e-7, atol=1e-5)


def test_moments_go_on_from_a_state() -> None:
    x = torch.randn(9, 4)
    whole, first = (Moments(torch.arange(4).reshape(1, 1, 4)) for _ in range(2))
    for part in x.split(3):
        whole.add(part)
    first.add(x[:3])
    later = Moments.of(first.state_dict())
    for part in x[3:].split(3):
        later.add(part)
    assert first.count == 3
    assert torch.equal(later.scatter, whole.scatter)
    assert torch.equal(later.mean, whole.mean)


def test_many_positions_are_looked_at_in_a_fixed_choice_and_strided_ones_as_they_are_read() -> None:
    x = torch.arange(2 * 32 * 32.0).reshape(2, 1, 32, 32)
    rows = rows_of(nn.Conv2d(1, 1, 3), x, limit=100)
    again = rows_of(nn.Conv2d(1, 1, 3), x.contiguous(memory_format=torch.channels_last), limit=100)
    assert rows.shape == (200, 1)
    assert torch.equal(rows, again)
    assert torch.equal(rows[100:], rows[:100] + 1024)
    strided = rows_of(nn.Conv2d(1, 1, 1, stride=4), x)
    assert torch.equal(strided.reshape(2, 8, 8), x[:, 0, ::4, ::4])


def test_padding_tokens_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with InputMoments(model, layouts(model, (), ["0"])) as inputs:
        inputs.start({"x": x, "attention_mask": mask})
        model(x)
    inputs.finish()
    assert inputs.moments["0"].count == 3
    torch.testing.assert_close(inputs.moments["0"].mean.flatten(), x[mask.bool()].double().mean(0))
    assert not model[0]._forward_pre_hooks
