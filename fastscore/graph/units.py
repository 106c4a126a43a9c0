"""Which channels of a group can only go together: the same place in each group of a grouped layer, equal parts of a
split, channels that meet at one position."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fastscore.graph.cutting import channel_buffers
from fastscore.graph.following import index_maps
from fastscore.graph.groups import READS, Member, Role
from fastscore.graph.layer_types import groups_of
from fastscore.modules.weights import recurrent


def units_of(layers: Mapping[str, nn.Module], channels: int, members: list[Member],
           chunks: Iterable[tuple[int, np.ndarray]]) -> Tensor:
    """The unit of each channel, int64 [C], numbered from 0 in order of first channel: see ChannelGroup."""
    parent = list(range(channels))

    def root(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    def tie(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    def same_position(period: int, positions: Iterable[Sequence[int]]) -> None:
        first_at: dict[int, int] = {}
        for position, channel in positions:
            tie(first_at.setdefault(position % period if period else position, channel), channel)

    for member in members:
        layer = layers[member.module]
        # A grouped convolution (or norm) keeps its groups equally wide, so the same number in each goes at once.
        sections = sections_of(layer, member.role)
        width = None if member.role == "tensor" else width_of(layer, member.role)
        period = width // sections if width is not None and sections > 1 else 0
        if period or (member.index[1:] == member.index[:-1]).any():  # sorted: equal positions are neighbours
            same_position(period, zip(member.index.tolist(), member.channel.tolist(), strict=True))
    for width, positions in chunks:  # chunk() takes equal parts of whatever is left
        same_position(width, zip((positions >> 32).tolist(), (positions & index_maps.CHANNEL).tolist(), strict=True))
    roots = [root(channel) for channel in range(channels)]
    number = {value: i for i, value in enumerate(sorted(set(roots)))}
    return torch.tensor([number[value] for value in roots], dtype=torch.int64)


def least_of(layers: Mapping[str, nn.Module], unit: Tensor, members: Iterable[Member]) -> int:
    """How many channels stay, whatever goes: of the units that a recurrent module projects, more than it makes of them.
    unit: of each channel."""
    least = max((recurrent.least_units(layers[member.module]) for member in members if member.role == "consumer"),
                default=1)
    return least * (len(unit) // (int(unit.max()) + 1)) if least > 1 else 1


def sections_of(layer: nn.Module, role: Role) -> int:
    """Into how many groups of equal width a grouped convolution or norm divides its channels; 1 for other layers, and
    for convolutions that work on each channel by itself."""
    alone = role == "tensor" or (role == "channelwise" and not isinstance(layer, nn.GroupNorm))
    return 1 if alone else groups_of(layer)


def width_of(layer: nn.Module, role: Role) -> int | None:
    """Channels of the layer's output (its input, for a consumer); None for a PReLU with one slope for all."""
    pruner = channel_buffers.surgeon(layer)
    width: int | None = pruner.get_in_channels(layer) if role in READS else pruner.get_out_channels(layer)
    return width


def first_channel_of_each_index(members: list[Member]) -> Iterator[Member]:
    """Members with each position named once: where tied channels meet, the lowest stands for them."""
    for member in members:
        first = member.index[1:] != member.index[:-1]  # positions are sorted by (index, channel)
        if first.all():
            yield member
            continue
        keep = torch.cat([torch.tensor([True]), first])
        yield replace(member, index=member.index[keep], channel=member.channel[keep])
