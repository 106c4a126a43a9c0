"""Splits and slices at places that a module keeps in attributes, `x.split(self.splits, 1)` or `x[:, :self.width]`, and
views of sizes that it keeps, or has in its code: with fewer channels, surgery writes new numbers there.

Which attributes these are is read off the code that runs and their values; that they are is found out as everything
else is: by surgery on a copy.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import FrameType
from typing import Any

from torch import Tensor, nn

from fastscore.graph.cutting import heads
from fastscore.modules import config_numbers, frames, number_tables, written_numbers
from fastscore.modules.weights.parameter_layers import ParameterLayer

TIMES = "*"  # between an attribute and how often it is taken
SIDE = "width "  # before the attribute, in what surgery takes out of a module


@dataclass(frozen=True)
class Width:
    """A number of channels that a module keeps: of those that lie at `begin` to `end` where its code cuts.

    attribute: its name; `name.2` is the third number of a list, `name//2` twice the number, `name*16` a sixteenth of
        it, and `name*9/2` two ninths; `object:name`, as config_numbers has it, is of an object that the module holds.
    """

    attribute: str
    begin: int
    end: int

    @property
    def number(self) -> str:
        """The attribute, or which of its numbers, however often it is taken."""
        return self.attribute.removesuffix("//2").partition(TIMES)[0]

    @property
    def name(self) -> str:
        """Of the attribute alone."""
        return self.number.partition(".")[0]


@dataclass(frozen=True)
class Cut:
    """A split, or slice, of a tensor; or zeros that code makes.

    function: of autograd, for its output; None of zeros. module: whose code it stands in. kept: attributes that this
    code reads -> their numbers. children: those of these attributes that another module has, which the code reads them
    of, or a caller of the code -> it. written: numbers that stand in the code itself, or in globals that it reads.
    named: those of the code that surgery can change -> their names. asked: numbers that the call is made with.
    """

    function: Any
    module: nn.Module
    kept: Mapping[str, int | list[int]]
    children: Mapping[str, nn.Module] = field(default_factory=dict)
    written: frozenset[int] = frozenset()
    named: Mapping[str, int] = field(default_factory=dict)
    asked: frozenset[int] = frozenset()

    def keeper(self, width: Width) -> nn.Module:
        """The module that keeps a number."""
        return self.keeper_of(width.name)

    def keeper_of(self, name: str) -> nn.Module:
        """The module that has an attribute of those that are kept."""
        return self.children.get(name, self.module)

    def places(self) -> set[tuple[nn.Module, str]]:
        """Of all numbers that are kept, and of those that stand in the code and are asked for."""
        return {(self.keeper_of(name), name) for name in self.kept} | {
            (self.keeper_of(name), name) for name, number in self.named.items() if number in self.asked}

    def may_be_of_several(self, sizes: Sequence[int]) -> bool:
        """Whether two numbers are kept of a part of a split, which are as large."""
        return any(len(self.all_of_size(size)) > 1 for size in set(sizes))

    def of_sizes(self, sizes: Sequence[int], by: Sequence[str] | None = None) -> list[Width] | None:
        """What is kept of a split into parts of these sizes; None where that is nothing. Of parts that are all alike
        and known by one number the first stands for all; one part may be what is left of the others, or of a number
        for all of them. by: the name of each part's number, where it is known."""
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        places = list(zip(begins, [*begins[1:], sum(sizes)], strict=True))
        for name, value in self.kept.items():
            if value == list(sizes):
                return [Width(f"{name}.{i}", *place) for i, place in enumerate(places)]
        if by is not None and len(set(by)) > 1:
            return [Width(name, *place) for name, place in zip(by, places, strict=True)]
        if len(set(sizes)) == 1:
            found = next((form for times, form in ((1, "{}"), (2, "{}//2")) if self._named(sizes[0] * times)), None)
            return None if found is None else [Width(found.format(self._named(sizes[0] * (1 if found == "{}" else 2))),
                                                     *places[0])]
        names = [self._named(size) for size in sizes]
        known = [name for name in names if name]
        if not known or len(known) < len(sizes) - 1:
            return None
        whole = self._named(sum(sizes)) if len(known) < len(sizes) else ""
        return [Width(name, *place) for name, place in zip([*names, whole], [*places, (0, sum(sizes))], strict=True)
                if name]

    def of_bounds(self, bounds: Sequence[int]) -> list[Width] | None:
        """What is kept of a slice that begins, or ends, at `bounds`; None where that is nothing."""
        names = [self._named(bound) for bound in bounds]
        return [Width(name, 0, bound) for name, bound in zip(names, bounds, strict=True)] if all(names) else None

    def of_size(self, size: int) -> Width | None:
        """What is kept of so many channels; None where that is nothing."""
        name = self._named(size)
        return Width(name, 0, size) if name else None

    def all_of_size(self, size: int) -> list[Width]:
        """All that is kept of so many channels."""
        return [Width(name, 0, size) for name in self._names(size)]

    def entry_of_size(self, size: int) -> list[Width]:
        """The number of a list that alone is so many channels there."""
        return [Width(f"{name}.{value.index(size)}", 0, size) for name, value in self.kept.items()
                if isinstance(value, list) and value.count(size) == 1]

    def _named(self, number: int) -> str:
        return next(self._names(number), "")

    def _names(self, number: int) -> Iterator[str]:
        yield from (name for name, value in self.kept.items() if value == number)
        yield from (name for name, value in self.named.items() if value == number and number in self.asked)


@dataclass(frozen=True)
class View:
    """What the code of a view says of its sizes.

    kept: dimension of the output -> the numbers of its size that modules keep. open: the one whose size is asked for as
    -1. code: that asks; None where it is no module's. asked: dimension of the output -> the size asked for.
    """

    kept: Mapping[int, Sequence[tuple[nn.Module, Width]]]
    open: int | None
    code: Cut | None = None
    asked: Mapping[int, int] = field(default_factory=dict)

    def widths(self, dim: int, channels: int) -> Iterator[tuple[nn.Module, Width]]:
        """What the size may be of a dimension that `channels` come to lie along: numbers that modules keep, or one that
        stands in its code."""
        size = self.asked.get(dim, 0)
        for module, width in self.kept.get(dim, ()):
            if size != channels or not _has_widths(module):
                yield module, width
        if self.code is not None and (size > channels or (size == channels and not _has_widths(self.code.module))):
            for name, number in self.code.named.items():
                if number == size:
                    yield self.code.module, Width(name, 0, size)

    def factors(self, dim: int, channels: int) -> list[tuple[nn.Module, str]]:
        """The places of numbers that the size of such a dimension may be a product of."""
        size = self.asked.get(dim, 0)
        if self.code is None or size < channels or (size == channels and _has_widths(self.code.module)):
            return []
        kept = [name for name, value in self.code.kept.items()
                if isinstance(value, int) and _may_count(value, channels)]
        written = [name for name, number in self.code.named.items() if _may_count(number, channels)]
        return [*((self.code.keeper(Width(name, 0, size)), name) for name in kept),
                *((self.code.module, name) for name in written)]

    def places(self) -> set[tuple[nn.Module, str]]:
        """Of numbers of the code that its sizes may be, or be products of."""
        named = {} if self.code is None else self.code.named
        return {(self.code.module, name) for size in self.asked.values() for name, number in named.items()
                if self.code is not None and number > 1 and size % number == 0}


def _may_count(number: int, channels: int) -> bool:
    """Whether a number may be one of channels, or of their parts, or of several times as many."""
    return number > 1 and (number % channels == 0 or channels % number == 0)


def _has_widths(module: nn.Module) -> bool:
    """Whether what a module keeps follows its own parameters, or its heads."""
    held = bool(module._parameters) or any(isinstance(layer, ParameterLayer) for layer in module._modules.values())
    return held or heads.count(module) is not None


def view_of(output: Tensor, asked: tuple[int, Sequence[int]], cut: Cut | None) -> View:
    """The view that has just made `output`, asked for sizes from a dimension on; cut: as cut_of gives it."""
    sizes = asked[1]
    first = asked[0] % max(output.dim() + 1 - len(sizes), 1)
    kept = {at: tuple((cut.keeper(width), width) for width in widths) for at, size in enumerate(sizes, first)
            if cut is not None and size > 1 and (widths := [*cut.all_of_size(size), *cut.entry_of_size(size)])}
    return View(kept, next((at for at, size in enumerate(sizes, first) if size == -1), None), cut,
                {at: size for at, size in enumerate(sizes, first) if size > 1})


def cut_of(function: Any, asked: Iterable[int] = ()) -> Cut | None:
    """The split or slice, or the making of zeros, that has just run, called by whatever has called this. asked: the
    numbers that it was called with."""
    found = _calling_frame()
    if found is None:
        return None
    owner, frame = found
    names = frame.f_code.co_names
    held = {name: vars(owner).get(name) for name in names} | dict(config_numbers.lists(owner, names))
    numbers = {name: _numbers(value) for name, value in held.items()}
    kept = {name: value for name, value in numbers.items() if value is not None}
    children = {name: child for child in map(owner._modules.get, names)
                if child is not None and not child._parameters  # a layer's own widths follow by themselves
                for name in names if name not in kept and type(vars(child).get(name)) is int}
    known = (*frame.f_code.co_consts, *map(frame.f_globals.get, names))
    kept |= {name: vars(child)[name] for name, child in children.items()}
    named, asked = written_numbers.of_frame(owner, frame), frozenset(number for number in asked if number > 1)
    for module, caller in _callers(frame) if asked else ():  # which may hand the number on
        of_caller = {name: vars(module).get(name) for name in caller.f_code.co_names}
        more: dict[str, int | list[int]] = {name: number for name, number in of_caller.items()
                                            if type(number) is int and name not in kept}
        written = {name: number for name, number in written_numbers.of_frame(module, caller).items()
                   if name not in named}
        kept, named = kept | more, named | written
        children |= dict.fromkeys((*more, *written), module) if module is not owner else {}
    return Cut(function, owner, kept, children, frozenset(number for number in known if type(number) is int), named,
               asked)


def calling_module() -> nn.Module | None:
    """The innermost module whose code calls whatever has called this."""
    found = _calling_frame()
    return None if found is None else found[0]


def calling_modules() -> list[nn.Module]:
    """Those whose code has called whatever has called this, the innermost first."""
    owners = map(frames.owner, frames.outwards())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))


def _calling_frame() -> tuple[nn.Module, FrameType] | None:
    """The innermost module whose code runs, and where."""
    return next(((module, frame) for frame in frames.outwards()
                 if isinstance(module := frames.owner(frame), nn.Module)), None)


def _callers(frame: FrameType) -> Iterator[tuple[nn.Module, FrameType]]:
    """The modules whose methods call a method, and where, outwards as far as no module is called as such."""
    outer = frame.f_back
    while outer is not None and frames.called(outer) is None:
        if isinstance(module := frames.owner(outer), nn.Module):
            yield module, outer
        outer = outer.f_back


def narrow(module: nn.Module, attribute: str, gone: int) -> None:
    """Take `gone` channels off what a module keeps. Raises ValueError where it keeps nothing of that name."""
    attribute, _, times_taken = attribute.partition(TIMES)
    less = gone / Fraction(times_taken or 1)
    gone = int(less)
    if less != gone:
        raise ValueError(f"{type(module).__name__} cannot have {less} channels less in {attribute}")
    if written_numbers.MARK in attribute:
        return written_numbers.take_off(module, attribute, gone)
    name, _, place = attribute.removesuffix("//2").partition(".")
    times = 2 if attribute.endswith("//2") else 1
    holder, key = config_numbers.holder(module, name)
    value: Any = getattr(holder, "__dict__", {}).get(key)
    if place in number_tables.entries(value):
        return number_tables.take_off(module, name, place, gone)
    if _numbers(value) is None:
        raise ValueError(f"{type(module).__name__} keeps no number of channels in {name}, as the model did that was "
                         "pruned: build the dense model as it was")
    holder, key = config_numbers.own_holder(module, name)
    vars(holder)[key] = type(value)(number - gone * (at == int(place)) for at, number in enumerate(value)) if place \
        else value - gone * times


def _numbers(value: object) -> int | list[int] | None:
    if type(value) is int:
        return value
    numbers = list(value) if type(value) in (list, tuple) else []  # type: ignore[call-overload]
    return numbers if numbers and all(type(number) is int for number in numbers) else None
