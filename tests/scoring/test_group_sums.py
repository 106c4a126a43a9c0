"""Sums of groups against loops over channels, for index maps of every kind."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.scoring import group_sums
from fastscore.scoring.group_sums import EdgeSums, JointSums, SideBySide
from fastscore.taps.measures import MEAN

PARTS = 3  # Σ a·g, the mean of a, Σ g


@st.composite
def cases(draw: Any) -> tuple[list[ChannelGroup], dict[str, list[Tensor]], Tensor | None]:
    """Groups, with channels tied to each other and layers that read some of them several times; what taps measured at
    those layers, in one call or two; and the scale [P, N] of each sample, if any."""
    widths = {f"layer {number}": draw(st.integers(1, 7)) for number in range(draw(st.integers(1, 3)))}
    groups = []
    for number in range(draw(st.integers(1, 3))):
        channels = draw(st.integers(1, 5))
        units = draw(st.lists(st.integers(0, channels - 1), min_size=channels, max_size=channels))
        unit = torch.unique(torch.tensor(units), return_inverse=True)[1]
        members = []
        for layer in draw(st.lists(st.sampled_from(list(widths)), min_size=1, unique=True)):
            index = draw(st.lists(st.integers(0, widths[layer] - 1), min_size=1, max_size=widths[layer], unique=True))
            channel = draw(st.lists(st.integers(0, channels - 1), min_size=len(index), max_size=len(index)))
            members.append(Member(layer, "consumer", torch.tensor(index), torch.tensor(channel)))
        groups.append(ChannelGroup(f"group {number}", channels, unit, tuple(members)))
    samples = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    sums = {layer: [torch.randn(PARTS, samples, width) for _ in range(draw(st.integers(1, 2)))]
            for layer, width in widths.items() if draw(st.booleans())}
    return groups, sums, torch.rand(PARTS, samples, dtype=torch.float64) if draw(st.booleans()) else None


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, PARTS - 1))
def test_joint_sums_are_those_of_a_loop(case: tuple[list[ChannelGroup], dict[str, list[Tensor]], Tensor | None],
                                        part: int) -> None:
    groups, sums, scale = case
    joint = JointSums(groups)
    assert joint.reads(tuple(sums)) == any(edge.layer in sums for group in groups for edge in group.edges)
    if not joint.reads(tuple(sums)):
        return  # no tap was reached: Totals does not ask
    samples = next(iter(sums.values()))[0].shape[1]
    found = joint.of_channels(joint(SideBySide.of(sums), part, None if scale is None else scale[part]))
    found = found.split(joint.channels, -1)
    for group, values in zip(groups, found, strict=True):
        want = torch.zeros(1, samples, group.channels, dtype=torch.float64)
        for channel in range(group.channels):
            for edge in group.edges:
                for position, carried in zip(edge.index.tolist(), edge.channel.tolist(), strict=True):
                    if group.unit[carried] == group.unit[channel]:
                        for call in sums.get(edge.layer, ()):
                            want[0, :, channel] += call[part, :, position].double()
        close(values, want if scale is None else want * scale[part][:, None])


@settings(deadline=None, max_examples=150)
@given(cases())
def test_edge_sums_are_those_of_a_loop(case: tuple[list[ChannelGroup], dict[str, list[Tensor]], Tensor | None]) -> None:
    groups, sums, scale = case
    for group in groups:
        edge_sums = EdgeSums(group)
        found = edge_sums(sums, scale)
        reached = [(edge, sums[edge.layer]) for edge in group.edges if sums.get(edge.layer)]
        if not reached:
            assert found is None
            continue
        units, samples = int(group.unit.max()) + 1, reached[0][1][0].shape[1]
        s = torch.zeros(samples, units, dtype=torch.float64)
        gradients, means = [], []  # one for each position, among those of an edge, that a unit may have
        for edge, calls in reached:
            values = sum(call.double() for call in calls)
            values[MEAN] = values[MEAN] / len(calls)  # one bias makes it good in all calls
            values = values if scale is None else values * scale[:, :, None]
            of_unit: dict[int, list[int]] = {}
            for position, carried in zip(edge.index.tolist(), edge.channel.tolist(), strict=True):
                of_unit.setdefault(int(group.unit[carried]), []).append(position)
            for place in range(max(map(len, of_unit.values()))):
                gradients.append(torch.zeros(samples, units, dtype=torch.float64))
                means.append(torch.zeros(samples, units, dtype=torch.float64))
                for unit, positions in of_unit.items():
                    if place < len(positions):
                        s[:, unit] += values[0, :, positions[place]]
                        means[-1][:, unit], gradients[-1][:, unit] = values[1:, :, positions[place]]
        assert found is not None
        close(found, torch.stack([s, *gradients, *means]))
        assert torch.equal(edge_sums.of_channels(found), found[..., group.unit])


def test_edges_whose_products_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.arange(4)
    group = ChannelGroup("a", 4, every, tuple(Member(f"layer {n}", "consumer", every, every) for n in range(3)))
    sums = {f"layer {n}": [torch.ones(PARTS, 2, 4)] for n in range(3)}
    monkeypatch.setattr(group_sums, "_MAX_PRODUCTS", 4 * 4 * 4)
    found = EdgeSums(group)(sums, None)
    assert found is not None
    assert found.shape == (7, 2, 4)
    monkeypatch.setattr(group_sums, "_MAX_PRODUCTS", 4 * 4 * 4 - 1)
    with pytest.raises(ValueError, match=r'^a: ablation="mean" needs the products of its 3 places.*ablation="zero"'):
        EdgeSums(group)(sums, None)


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and "device" in (kwargs or {}) \
            and torch.device(kwargs["device"]) != args[0].device
        return func(*args, **(kwargs or {}))


def test_indices_go_to_a_device_once() -> None:
    """A copy in each pass is waited for, and no CUDA graph bears it."""
    index = torch.arange(4)
    edges = EdgeSums(ChannelGroup("group", 4, index // 2, tuple(
        Member(layer, "consumer", index, index) for layer in ("a", "b"))))
    sums = {layer: [torch.randn(PARTS, 3, 4, device="meta")] for layer in ("a", "b")}
    counts = []
    for _ in range(3):
        with Copies() as copies:
            values = edges(sums, None)
            assert values is not None
            assert edges.of_channels(values).shape[-1] == 4
        counts.append(copies.count)
    assert counts == [7, 0, 0]


class Shared(nn.Module):
    """A layer that reads the channels of another twice."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu()) - 2 * self.head(self.hidden(x + 1).relu())


def test_a_layer_that_is_called_twice_has_one_mean_of_each_channel() -> None:
    """Its bias, which makes good what went, is the same in both calls."""
    model, x = Shared().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64)
    scores = fastscore.score(model, [x[:2], x[2:]], ablation="mean", gradient="loss", normalize=False, progress=False,
                             loss=lambda y, batch: (y * v[:2] if len(y) == 2 else y * v[2:]).sum())
    first, second = (model.hidden(given).relu().detach() for given in (x, x + 1))
    g = v @ model.head.weight.detach()
    mean = (first.mean(0) + second.mean(0)) / 2
    close(scores["hidden"].double(), ((first - mean) * g - 2 * (second - mean) * g).square().mean(0))
