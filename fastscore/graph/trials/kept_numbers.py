"""Numbers that modules keep of how many channels there are, and by which their code asks for them, or makes what it
writes them to: `assert x.shape[-1] == self.embed_dim`, `x.new_zeros(n, self.embed_dim)`.

No channels are cut there, so that nobody follows them: that the code fails is all there is to see. Of the module that
fails, a number as large as the group, which its code has for nothing but sizes and checks, is made smaller with it;
where the model runs then, and reads what it read, it was the one.
"""

import itertools
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.trials import surgery_trial
from fastscore.graph.trials.recording import Recording
from fastscore.modules.number_uses import Uses
from fastscore.modules.reachable_code import ReachableCode

_MOST = 64  # trials of a group
_PLACE = re.compile(r"\(([^ ()]+) \(\w+\): ")  # in a reason: the module that does not run


def mended(recording: Recording, groups: Sequence[ChannelGroup], refused: Mapping[str, str]
           ) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups that were tried, those that go with such numbers together with them; and what is `refused` of them still,
    name -> why."""
    sizes = _Sizes(recording.model)
    found = {group.name: more for group in groups if group.name in refused
             and (more := _with_numbers(recording, group, refused[group.name], sizes, iter(range(_MOST)))) is not None}
    if not found:
        return list(groups), dict(refused)
    after = [found.get(group.name, group) for group in groups]
    failing = surgery_trial.refusals(recording, [group for group in after
                                                 if group.name in found or group.name not in refused])
    if not failing.keys() <= found.keys():
        return list(groups), dict(refused)
    return after, {name: why for name, why in refused.items() if name not in found or name in failing}


class _Sizes:
    """The numbers that modules keep, and that their code has for sizes and checks alone, in any branch."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[nn.Module, str], bool] = {}

    @cached_property
    def _code(self) -> ReachableCode:
        return ReachableCode(self._model)

    def of(self, module: nn.Module, group: ChannelGroup) -> list[str]:
        """The attributes of a module that are as large as a group."""
        as_large = [name for name, value in vars(module).items()
                    if type(value) is int and value == group.channels and not name.startswith("_")]
        for name in as_large:
            if (module, name) not in self._known:
                self._known[module, name] = Uses(self._code, module, name, ()).other() is None
        return [name for name in as_large if self._known[module, name]]


def _with_numbers(recording: Recording, group: ChannelGroup, reason: str, sizes: _Sizes, trials: Iterator[int]
                  ) -> ChannelGroup | None:
    """The group, with numbers that let it go; None where none do. trials: as many as are left."""
    modules = dict(recording.model.named_modules())
    name = _failing(reason)
    if name is None or name not in modules:
        return None
    alike = [other for other, module in modules.items() if type(module) is type(modules[name])]
    for attribute in sizes.of(modules[name], group):
        for owners, only in itertools.product((alike, [name]) if len(alike) > 1 else (alike,), (True, False)):
            owners = [owner for owner in owners if attribute in sizes.of(modules[owner], group)]
            before = _without(group, owners)
            if not only and before is group:
                continue  # which was tried
            if next(trials, None) is None:
                return None
            more = _with(before if only else group, attribute, owners)
            why = surgery_trial.refusals(recording, [more]).get(group.name)
            if why is None:
                return more
            if _failing(why) not in owners and (
                    found := _with_numbers(recording, more, why, sizes, trials)) is not None:
                return found
    return None


def _failing(reason: str) -> str | None:
    """The module whose code does not run; None where a reason names none."""
    place = _PLACE.search(reason) if "does not run" in reason else None
    return None if place is None else place[1]


def _without(group: ChannelGroup, owners: Container[str]) -> ChannelGroup:
    """The group less numbers of `owners`, of which another one may have been taken for that which follows."""
    left = tuple(member for member in group.members if member.role != "width" or member.layer not in owners
                 or len(member.index) < group.channels)
    return group if len(left) == len(group.members) else replace(group, members=left)


def _with(group: ChannelGroup, attribute: str, owners: Sequence[str]) -> ChannelGroup:
    every, known = torch.arange(group.channels), {(member.layer, member.attribute) for member in group.role("width")}
    return replace(group, members=(*group.members, *(Member(owner, "width", every, every, attribute=attribute)
                                                     for owner in owners if (owner, attribute) not in known)))
