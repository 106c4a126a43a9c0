"""Numbers that attentions keep and that may count heads, or their channels: as few of them as let heads go."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from fastscore.graph.cutting import heads
from fastscore.graph.following.nodes import CHANNELWISE, PRODUCERS
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.layer_types import type_of
from fastscore.modules.lines_run import Line, lines_run
from fastscore.modules.norms import channel_norms
from fastscore.modules.number_uses import Uses
from fastscore.modules.reachable_code import ReachableCode

_MOST_TRIALS = 24  # sets of numbers that are tried


def built(module: nn.Module, but: Container[tuple[str, str]] = ()) -> tuple[Any, ...]:
    """Alike for modules that are built alike: of the same classes, with tensors of the same shapes, and with the same
    words, flags and whole numbers, by which code chooses how heads lie; but for some: see `numbering`."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    settings = ((name, type(part), *((attribute, _hashable(value)) for attribute, value in vars(part).items()
                                     if _is_setting(value) and (name, attribute) not in but))
                for name, part in module.named_modules())
    return (*((name, tensor.shape) for name, tensor in tensors), *settings)


def kinds(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Name of each module -> the same for all that are built alike, but for whole numbers that count them."""
    of_class = defaultdict[type, list[nn.Module]](list)
    for module in modules.values():
        of_class[type(module)].append(module)
    numbers = {kind: numbering(held) for kind, held in of_class.items()}
    return {name: built(module, numbers[type(module)]) for name, module in modules.items()}


def numbering(modules: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """(what a module holds, attribute) of whole numbers that count modules of one class, as `layer_idx` does: each has
    one more than the one before it."""
    held = defaultdict[tuple[str, str], list[int]](list)
    for module in modules:
        for name, part in module.named_modules():
            for attribute, value in vars(part).items():
                if type(value) is int:
                    held[name, attribute].append(value)
    return {key for key, values in held.items()
            if len(values) == len(modules) > 1 and values == [*range(values[0], values[0] + len(values))]}


def _is_setting(value: object) -> bool:
    return isinstance(value, bool | int | str | type | None) or (
        isinstance(value, tuple | list) and all(map(_is_setting, value)))


def _hashable(value: object) -> object:
    return tuple(map(_hashable, value)) if isinstance(value, tuple | list) else value


def with_numbers(module: nn.Module, group: ChannelGroup, fails: Callable[[ChannelGroup], str | None]
                 ) -> ChannelGroup | str:
    """The group, with as few of the numbers that a module keeps as let it go; or why it does not go with any.

    fails: why a group does not go, or None.
    """
    first = ""
    for way in _ways(module, group):
        every, held = list(_counts(module, way)), {member.module for member in way.role("tensor")}
        of_norms = [each for each in every if each.layer in held
                    and isinstance(module.get_submodule(each.layer), nn.GroupNorm)]
        every = [each for each in every if all(each is not other for other in of_norms)]
        chosen = itertools.chain.from_iterable(itertools.combinations(every, size) for size in range(len(every) + 1))
        for more in itertools.islice(chosen, 1 + _MOST_TRIALS):
            # a norm says what it has lost, whether it is asked or not
            likely = replace(way, members=(*way.members, *of_norms, *more))
            reason = fails(likely)
            if reason is None:
                return likely
            first = first or reason
    return first


def decided_by(model: nn.Module, groups: Sequence[ChannelGroup], run: Callable[[], object]) -> dict[str, str]:
    """Group of heads -> why it stays: the code compares with a number that goes with them, or cuts something at it, of
    which no run need have shown more than one side; or it computes with it what `run`, the model's, does not show."""
    code: ReachableCode | None = None

    @cache
    def lines() -> set[Line]:
        return lines_run(run, {function.__code__.co_filename for function in code.functions} if code else ())

    known, found = dict[tuple[str, str], str | None](), dict[str, str]()
    for group in groups:
        counts = [(f"{member.layer}.{child}".strip("."), name) for member in group.role("heads") for child, name in
                  heads.counted(model.get_submodule(member.layer), member.attribute != heads.COUNTS_ALONE)]
        counts += [(member.layer, member.attribute) for member in group.role("width") if counts]
        for owner, name in sorted(counts):
            module = model.get_submodule(owner)
            if "." not in name and (owner, name) not in known:
                code = code or ReachableCode(model)
                known[owner, name] = Uses(code, module, name, (), lines).other()
            if (why := known.get((owner, name))) is not None:
                found[group.name] = f"{name} of {type(module).__name__} counts heads, or their channels, and is more " \
                                    f"than a size in {why}: let this have a number of its own"
    return found


def _ways(module: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """The group, where what is called a width of its heads is one; and where it is not, as that of a stream which
    happens to be as wide."""
    yield group
    if heads.counted(module) != heads.counted(module, widths=False):
        yield replace(group, members=tuple(replace(member, attribute=heads.COUNTS_ALONE) if member.role == "heads" else
                                           member for member in group.members))


def units_of(group: ChannelGroup) -> int:
    return int(group.unit.max()) + 1


def numbers(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(name of a module, attribute, number) of all that a module and what it holds keep, but for its layers; `name.2`
    is the third number of a tuple or list."""
    for name, part in module.named_modules():
        layer = type_of(part) in PRODUCERS | CHANNELWISE and not isinstance(part, nn.GroupNorm)
        for attribute, value in () if layer or channel_norms.norm_of(part) is not None else vars(part).items():
            if type(value) is int and not attribute.startswith("_"):
                yield name, attribute, value
            elif type(value) in (tuple, list) and all(type(each) is int for each in value):
                yield from ((name, f"{attribute}.{place}", each) for place, each in enumerate(value))


def _counts(module: nn.Module, group: ChannelGroup) -> Iterator[Member]:
    """Members for numbers that may count heads, those of keys and values, or all their channels; likeliest first."""
    units = units_of(group)
    firsts = torch.stack([(group.unit == unit).nonzero()[0, 0] for unit in range(units)])
    likely = {units, len(next(group.role("heads")).index), group.channels,
              *(len(member.index) for member in group.role("producer"))}
    known = heads.counted(module, next(group.role("heads")).attribute != heads.COUNTS_ALONE)
    found = [each for each in numbers(module) if each[:2] not in known and each[2] > 0 and each[2] % units == 0
             and ("." not in each[1] or each[2] in likely)]
    partly = {width: member for member in group.role("producer", "channelwise")
              if (width := _width_of(module, member)) > len(member.index)}
    for name, attribute, value in numbers(module):
        if (name, attribute) not in known and value in partly:
            yield Member(name, "width", partly[value].index, partly[value].channel, attribute=attribute)
    for name, attribute, value in sorted(found, key=lambda each: each[2] not in likely):
        if value not in partly:
            yield Member(name, "width", torch.arange(value), firsts.repeat_interleave(value // units),
                         attribute=attribute)


def _width_of(module: nn.Module, member: Member) -> int:
    """How many channels the layer makes, or works on, of which a member says which are of heads."""
    weight = module.get_submodule(member.layer)._parameters.get("weight")
    return 0 if weight is None else len(weight)
