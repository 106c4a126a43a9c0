"""Which of the numbers that modules keep, or have in their code, sizes are made of, and nothing else."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.graph.cutting.cut_widths import TIMES, Cut, Width
from fastscore.modules import config_numbers, frames, marked_numbers, written_numbers
from fastscore.modules.lines_run import Line
from fastscore.modules.marked_numbers import Marked, Place
from fastscore.modules.number_uses import Uses
from fastscore.modules.reachable_code import ReachableCode

SPLITS = (torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes)
SLICES = (Tensor.__getitem__, torch.narrow, Tensor.narrow)
VIEWS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten)
ZEROS = (torch.zeros, Tensor.new_zeros)
_MORE = (Tensor.expand, torch.ones, Tensor.new_ones, torch.rand, torch.randn)


class AskedSizes:
    """Of some numbers, what a run of a model makes of them, and what its code may.

    run: runs the model once more. places: of the numbers.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object], places: Collection[Place]) -> None:
        self._noted = _Noted()
        with suppress(Exception), marked_numbers.marked(places), torch.no_grad(), self._noted:
            run()  # as far as code comes that minds: what it asks for after that is not known, and stays
        self._model, self._places = model, places
        self._code: ReachableCode | None = None
        self._others: dict[Place, str | None] = {}

    def holds(self, module: nn.Module, width: Width) -> bool:
        """Whether a number is one that a view, cut or zeros are made with: others may be as large by chance."""
        return (module, width.name) in self._noted.places

    def width_of(self, code: Cut, shape: tuple[int, ...], dim: int) -> Width | None:
        """The number that is the width of zeros of that shape along a dimension; None where none is known to be, or one
        that stands in the code is that of another dimension, too."""
        code = self.with_known(code)
        found, known = code.all_of_size(shape[dim]), self._noted.zeros.get(shape, ()) if code.named else ()
        by = {place for sizes in known for place, slope in sizes[dim].items() if slope == 1}
        width = next((width for width in found if (code.keeper(width), width.name) in by and (  # layers follow anyway
            written_numbers.MARK in width.name or code.keeper(width) is code.module)), code.of_size(shape[dim]))
        twice = width is not None and written_numbers.MARK in width.name and any(
            sum((code.keeper(width), width.name) in slopes for slopes in sizes) > 1 for sizes in known)
        return None if twice else width

    def with_known(self, cut: Cut) -> Cut:
        """A cut, or zeros, of which no other numbers that stand in the code are known than what it was asked for with:
        others may be as large by chance."""
        return replace(cut, named={name: number for name, number in cut.named.items()
                                   if (number, (cut.keeper_of(name), name)) in self._noted.alone})

    def of_views(self, module: nn.Module, width: Width) -> bool:
        """Whether a number is one that so large a size of a view is made of."""
        return any((module, width.name) in slopes for slopes in self._noted.sizes.get(width.end, ()))

    def split_by(self, cut: Cut, sizes: Sequence[int]) -> list[str] | None:
        """The numbers that the code of a cut splits by, by their names, one for each part; None where it computes some,
        or does not always split so."""
        found = {places for known, places in self._noted.splits if known == tuple(sizes) and places is not None
                 and all(cut.keeper_of(name) is module for module, name in places)}
        return [name for _, name in found.pop()] if len(found) == 1 else None

    def products(self, places: Iterable[Place], size: int, channels: int, least: int
                 ) -> Iterator[tuple[nn.Module, Width]]:
        """Those of the numbers that so large a size of a view is a multiple of, as code computes it, where it computes
        it of no size of a tensor that has as many `channels`, and follows these by itself. least: of the size, what
        goes with the least that can go: the number is to lose a whole one then, or it counts something else."""
        for module, name in places:
            for slopes in self._noted.sizes.get(size, ()):
                slope = slopes.get((module, name), 0)
                if slope not in (0, 1) and least % slope == 0 and slope * _number(module, name) == size and (
                        (_TENSORS, str(channels)) not in slopes):
                    yield module, Width(f"{name}{TIMES}{slope}", 0, size)

    def other_use(self, module: nn.Module, width: Width) -> str | None:
        """What else a number is for, or may be, in words; None where it is for nothing else."""
        place = module, width.name
        if place not in self._others:
            self._code = self._code or ReachableCode(self._model, self._noted.codes)
            held, key = config_numbers.holder(*place)
            same = {each for each in self._places  # of an object that several modules hold
                    if (other := config_numbers.holder(*each))[0] is held and other[1] == key}
            self._others[place] = Uses(
                self._code, *place, self._noted.lines(same), dims=self._noted.dims[place]).other()
        return self._others[place]


class _Noted(TorchFunctionMode):
    """Notes which Marked numbers views, cuts and zeros are asked for with; the lines that cut something at such, or
    make more of such a size; and what code of modules has run. The sizes of tensors are Marked, too."""

    def __init__(self) -> None:
        super().__init__()
        self.places = set[Place]()
        self.splits = set[tuple[tuple[int, ...], tuple[Place, ...] | None]]()  # sizes, and where each is from alone
        self.sizes = defaultdict[int, list[Mapping[Place, Fraction]]](list)  # of views -> slopes, as Marked has them
        self.zeros = defaultdict[tuple[int, ...], list[list[Mapping[Place, Fraction]]]](list)  # shape -> the same
        self.alone = set[tuple[int, Place]]()  # numbers that cuts and zeros are asked for with, as they are at a place
        self.dims = defaultdict[Place, set[tuple[int, int]]](set)  # along which one is a size, and of how many
        self._cut, self._whole = (set[tuple[Line, Place]]() for _ in range(2))  # where a number did, and cut nothing
        self.codes = set[Any]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _OF_TENSORS:
            return _size(output) if isinstance(output, int) else torch.Size(map(_size, output))
        of_size = func in (*VIEWS, *SPLITS, *SLICES, *ZEROS)
        given = args, tuple(kwargs.values())
        less = list(_each_less(given)) if of_size or func in _MORE else []
        if numbers := [number for number, _ in less]:
            for number in numbers if of_size else ():
                self.places |= number.slopes.keys()
                self.alone |= {(int(number), place) for place, slope in number.slopes.items()
                               if slope == len(number.slopes) == 1 and func not in VIEWS}
                self.sizes[int(number)] += [number.slopes] if func in VIEWS else []
            if func in ZEROS and len(sizes := _sizes((args, *kwargs.values()))) == output.dim():
                self.zeros[tuple(output.shape)].append([getattr(size, "slopes", {}) for size in sizes])
            for parts in (*args[1:], *kwargs.values()) if func in SPLITS else ():
                if isinstance(parts, tuple | list):
                    self.splits.add((tuple(map(int, parts)), _places(parts)))
            for dim in _dims(func, args, output, {int(number) for number in numbers}):
                for place in (place for number in numbers for place in number.slopes):
                    self.dims[place].add((dim, _tensors(output)[0].dim()))
            stack = list(frames.outwards())
            self.codes.update(frame.f_code for frame in stack)
            at = next(frame for frame in stack if frame.f_globals.get("__name__", "").partition(".")[0] not in _OURS)
            line = at.f_code.co_filename, at.f_lineno
            for number, (other, others) in less:
                cuts = func not in (*SPLITS, *SLICES) or _differs(
                    func, other, dict(zip(kwargs, others, strict=True)), output)
                (self._cut if cuts else self._whole).update((line, place) for place in number.slopes)
        return output

    def lines(self, places: Collection[Place]) -> set[Line]:
        """Those of which every cut that was made there with numbers of these is known."""
        whole = {line for line, place in self._whole if place in places}
        return {line for line, place in self._cut if place in places} - whole


_TENSORS = nn.Module()  # whose places are the sizes of tensors, by their values
_OF_TENSORS = (Tensor.size, inspect.getattr_static(Tensor, "shape").__get__)


def _size(number: int) -> Marked:
    return Marked.at(number, (_TENSORS, str(int(number))))


_OURS = ("torch", "einops", __name__.partition(".")[0])  # whose lines say nothing of a model


def _each_less(given: Any) -> Iterator[tuple[Marked, Any]]:
    """Each number of modules among some arguments, and these with one less of it."""
    if isinstance(given, Marked) and any(module is not _TENSORS for module, _ in given.slopes):
        yield given, int(given) - 1
    parts = (given.start, given.stop) if isinstance(given, slice) else given
    for at, part in enumerate(parts if isinstance(parts, tuple | list) else ()):
        for number, less in _each_less(part):
            others = (*parts[:at], less, *parts[at + 1:])
            yield number, slice(others[0], others[1], given.step) if isinstance(given, slice) else \
                list(others) if isinstance(given, list) else others


def _sizes(given: Any) -> list[int]:
    """The numbers that a function is given, in their order."""
    if isinstance(given, int):
        return [] if isinstance(given, bool) else [given]
    return [size for each in given for size in _sizes(each)] if isinstance(given, tuple | list) else []


def _places(parts: Sequence[int]) -> tuple[Place, ...] | None:
    """Where each of several numbers is from, as it is; None where that is not so of all."""
    alone = [dict(part.slopes) if isinstance(part, Marked) else {} for part in parts]
    return tuple(next(iter(slopes)) for slopes in alone) if all(list(each.values()) == [1] for each in alone) else None


def _number(module: nn.Module, name: str) -> int:
    """What a place holds; 0 where that is several numbers."""
    if written_numbers.MARK in name:
        return written_numbers.number(module, name)
    holder, key = config_numbers.holder(module, name)
    held: Any = vars(holder)[key]
    return held if isinstance(held, int) else 0


def _dims(func: Any, args: Any, output: Any, numbers: Collection[int]) -> list[int]:
    """The dimensions that something cuts, or that it makes as large as one of some numbers."""
    made, cut = _tensors(output)[0].shape, args[0].shape if func in (*SPLITS, *SLICES) else None
    return [dim for dim, size in enumerate(made) if (size in numbers if cut is None else
                                                     len(cut) == len(made) and size != cut[dim])]


def _differs(func: Any, args: Any, kwargs: Any, output: Any) -> bool:
    try:
        other = func(*args, **kwargs)
    except (RuntimeError, IndexError):
        return True
    return [_place(each) for each in _tensors(other)] != [_place(each) for each in _tensors(output)]


def _place(part: Tensor) -> tuple[torch.Size, int]:
    """How large a part is, and where it begins."""
    return part.shape, int(part.storage_offset())


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
