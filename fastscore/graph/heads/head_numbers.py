"""Numbers that attentions keep and that may count heads, or their channels: as few of them as let heads go."""

import itertools
import math
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
from fastscore.modules import number_tables
from fastscore.modules.lines_run import Line, lines_run
from fastscore.modules.norms import channel_norms, gated_norms
from fastscore.modules.number_uses import Uses
from fastscore.modules.reachable_code import ReachableCode

_MOST_TRIALS = 60  # sets of numbers that are tried


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
        isinstance(value, tuple | list) and all(map(_is_setting, value))) or bool(number_tables.entries(value))


def _hashable(value: object) -> object:
    value = [*number_tables.entries(value).items()] if isinstance(value, dict) else value
    return tuple(map(_hashable, value)) if isinstance(value, tuple | list) else value


def with_numbers(module: nn.Module, group: ChannelGroup, fails: Callable[[ChannelGroup], str | None]
                 ) -> ChannelGroup | str:
    """The group, with as few of the numbers that a module keeps as let it go; or why it does not go with any.

    fails: why a group does not go, or None; a Stopped, where code does not run.
    """
    first = ""
    for way in _ways(module, group):
        every, held = list(_counts(module, way)), {member.module for member in way.role("tensor")}
        of_norms = [each for each in every if each.layer in held
                    and isinstance(module.get_submodule(each.layer), nn.GroupNorm)]
        # a norm says what it has lost, whether it is asked or not
        search = _Search(replace(way, members=(*way.members, *of_norms)), fails,
                         [each for each in every if all(each is not other for other in of_norms)])
        found = search.found()
        if isinstance(found, ChannelGroup):
            return found
        first = first or found
    return first


class Stopped(str):
    """Why code does not run. steps: how many operations it came to."""

    steps: int

    def __new__(cls, why: str, steps: int) -> "Stopped":
        made = super().__new__(cls, why)
        made.steps = steps
        return made


class _Search:
    """For as few of `numbers`, likeliest first, as let a group go.

    A number that goes with the heads shows by what becomes of a run without it: code stops elsewhere, or for another
    reason. So those are looked for one, or some, at a time, with which it comes further than without."""

    def __init__(self, group: ChannelGroup, fails: Callable[[ChannelGroup], str | None], numbers: Sequence[Member]
                 ) -> None:
        self._group, self._fails, self._numbers = group, fails, numbers
        self._tried = dict[frozenset[int], str | None]()

    def found(self) -> ChannelGroup | str:
        """The group with these; or why it does not go without any."""
        chosen: frozenset[int] | None = frozenset()
        while chosen is not None and self._why(chosen) is not None:
            chosen = self._further(chosen)
        if chosen is None:
            chosen = next((some for some in self._likely() if self._left(some) and self._why(some) is None), None)
        if chosen is None:
            return self._tried[frozenset()] or ""
        for number in sorted(chosen, reverse=True):  # the least likely first
            if len(chosen) > 1 and self._left(chosen - {number}) and self._why(chosen - {number}) is None:
                chosen -= {number}
        return self._with(chosen)

    def _likely(self) -> Iterator[frozenset[int]]:
        every = range(len(self._numbers))
        sets = itertools.chain.from_iterable(itertools.combinations(every, size) for size in range(len(every) + 1))
        return map(frozenset, itertools.islice(sets, 1 + _MOST_TRIALS))

    def _further(self, chosen: frozenset[int]) -> frozenset[int] | None:
        """The first of the least sets of more numbers with which code comes furthest, and further than without."""
        shown, without = set[int](), self._outcome(chosen)
        for size in (1, 2, 3):
            best, most = None, without[0]
            for more in itertools.combinations(set(range(len(self._numbers))) - chosen, size):
                some = chosen.union(more)
                if len(shown.intersection(more)) < size - 1 or not self._left(some):
                    continue
                steps, why = self._outcome(some)
                if why is None:
                    return some
                if size == 1 and (steps, why) != without:
                    shown.update(more)
                if most < steps < math.inf:  # it does not help that code runs through, and makes something else
                    best, most = some, steps
            if best is not None:
                return best
        return None

    def _left(self, some: frozenset[int]) -> bool:
        return some in self._tried or len(self._tried) <= _MOST_TRIALS

    def _outcome(self, some: frozenset[int]) -> tuple[float, str | None]:
        why = self._why(some)
        return getattr(why, "steps", math.inf), why

    def _why(self, some: frozenset[int]) -> str | None:
        if some not in self._tried:
            self._tried[some] = self._fails(self._with(some))
        return self._tried[some]

    def _with(self, some: frozenset[int]) -> ChannelGroup:
        return replace(self._group, members=(*self._group.members, *(self._numbers[each] for each in sorted(some))))


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
                  heads.counted(model.get_submodule(member.layer), member.attribute)]
        if any(group.role("heads")):  # whatever the number is called
            counts += [(member.layer, member.attribute) for member in group.role("width")]
        for owner, name in sorted(counts):
            module = model.get_submodule(owner)
            if not name.rpartition(".")[2].isdigit() and (owner, name) not in known:
                code = code or ReachableCode(model)
                known[owner, name] = Uses(code, module, name, (), lines).other()
            if (why := known.get((owner, name))) is not None:
                found[group.name] = f"{name} of {type(module).__name__} counts heads, or their channels, and is more " \
                                    f"than a size in {why}: let this have a number of its own"
    return found


def _ways(module: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """The group, where what is called a width of its heads is one, and what children count are its heads; and where the
    one is not, as that of a stream which happens to be as wide, or the other."""
    yield group
    for which in (heads.COUNTS_ALONE, heads.OWN_ALONE):
        if heads.counted(module) != heads.counted(module, which) != set():
            yield replace(group, members=tuple(replace(member, attribute=which) if member.role == "heads" else member
                                               for member in group.members))


def units_of(group: ChannelGroup) -> int:
    return int(group.unit.max()) + 1


def numbers(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(name of a module, attribute, number) of all that a module and what it holds keep, but for its layers; `name.2`
    is the third number of a tuple or list, `name.key` one of a table."""
    for name, part in module.named_modules():
        layer = type_of(part) in PRODUCERS | CHANNELWISE and not isinstance(part, nn.GroupNorm)
        norm = channel_norms.norm_of(part) is not None and gated_norms.gated_norm_of(part) is None
        for attribute, value in () if layer or norm else vars(part).items():
            if type(value) is int and not attribute.startswith("_"):
                yield name, attribute, value
            elif type(value) in (tuple, list) and all(type(each) is int for each in value):
                yield from ((name, f"{attribute}.{place}", each) for place, each in enumerate(value))
            elif not attribute.startswith("_"):
                yield from ((name, f"{attribute}.{key}", each) for key, each in number_tables.entries(value).items())


def _counts(module: nn.Module, group: ChannelGroup) -> Iterator[Member]:
    """Members for numbers that may count heads, those of keys and values, or all their channels; likeliest first."""
    units = units_of(group)
    firsts = torch.stack([(group.unit == unit).nonzero()[0, 0] for unit in range(units)])
    likely = {units, len(next(group.role("heads")).index), group.channels,
              *(len(member.index) for member in group.role("producer"))}
    known = heads.counted(module, next(group.role("heads")).attribute)
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
