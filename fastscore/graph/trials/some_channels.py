"""Channels that go in a trial by surgery."""

import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.graph.groups import ChannelGroup


def some_channels(groups: Sequence[ChannelGroup], part: int) -> dict[str, Tensor]:
    """Group -> channels to go, int64; those that stay in part 0 go in part 1."""
    before = Counter[int]()  # groups of each number of units: those that meet are not to lose the same number
    removed = dict[str, Tensor]()
    for group in groups:
        units = int(group.unit.max()) + 1
        removed[group.name] = _some_units(group, part, before[units])
        before[units] += 1
    return removed


def _some_units(group: ChannelGroup, part: int, before: int) -> Tensor:
    """Channels to go, int64: about half of the units, at random; an odd number of units stays, if it can be, and
    another than of the group of as many units before it: `before` were tried beside it. Those that stay in part 0 go in
    part 1."""
    units, seed = int(group.unit.max()) + 1, zlib.crc32(group.name.encode())
    numbers = list(range(units // 2 | 1, units // 4, -2))
    if len(numbers) == 1 and units > 3:
        numbers.append(2)
    first = numbers[before % len(numbers)]
    rest = units - first
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    stay = order[:first] if part == 0 else order[first:first + rest - 1 + rest % 2]
    gone = torch.ones(units, dtype=torch.bool).index_fill(0, stay, False)
    for member in group.members:  # of a part of the channels one stays as well
        if 0 < len(member.channel) < group.channels and gone[group.unit[member.channel]].all():
            gone[group.unit[member.channel[0]]] = False
    for unit in order.tolist():
        if int((~gone[group.unit]).sum()) >= group.least:
            break
        gone[unit] = False
    return gone[group.unit].nonzero()[:, 0]
