"""Numbers that stand in a module's code, `x.view(-1, 16 * 5 * 5)`. With fewer channels the module gets a class of its
own: the same code with other numbers.
"""

import dis
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache, lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from fastscore.modules.attention import by_function, own_width
from fastscore.modules.changed_source import with_code, with_source
from fastscore.modules.made_classes import Made, made_class, put_together, taken_apart
from fastscore.modules.weights.parameter_layers import changed

MARK = "#"  # between a method and the number that its code had first: `forward#400`


class _OtherNumbers(Made):
    """numbers: method#number -> that in its place."""

    _numbers: Mapping[str, int]


def of_frame(module: nn.Module, frame: FrameType) -> dict[str, int]:
    """The names of the numbers that stand in the code that runs -> they. None of code that is no method of the module,
    or of attentions whose code is another one once heads are gone."""
    kind, code = type(module), frame.f_code
    if _method(_with_code(kind), code.co_name) is not code or own_width.asks(module) or by_function.is_one(kind):
        return {}
    firsts = {now: name for name, now in _numbers_of(kind).items() if name.startswith(f"{code.co_name}{MARK}")}
    return {firsts.get(number, f"{code.co_name}{MARK}{number}"): number for number in _read(code)}


def number(module: nn.Module, name: str) -> int:
    """What a number of the code of a module is now."""
    return _numbers_of(type(module)).get(name, int(name.partition(MARK)[2]))


def times(module: nn.Module, name: str) -> int:
    """At how many places the code of a module has a number."""
    code = _method(_with_code(type(module)), name.partition(MARK)[0])
    return 0 if code is None else _read(code).get(number(module, name), 0)


def in_source(module: nn.Module, name: str) -> int:
    """What a number of the code of a module is in the source of this code, which may be that of the class as it was."""
    kind, (method, number_then) = _with_code(type(module)), name.split(MARK)
    files = {getattr(each, method).__code__.co_filename for each in (kind, taken_apart(kind)[0])}
    return number(module, name) if len(files) > 1 else int(number_then)


def with_mark(module: nn.Module, name: str, mark: int) -> type[nn.Module]:
    """A class of a module, for a run of its own, with `mark` in the place of a number of its code."""
    kind, method = type(module), name.partition(MARK)[0]
    own, others = _with_code(kind), _other_steps(kind)
    marked = type(kind.__name__, (own if others else kind,), {
        "__module__": kind.__module__, method: _function(getattr(own, method), {number(module, name): mark})})
    return put_together(marked, *others)


def take_off(module: nn.Module, name: str, gone: int) -> None:
    """Take `gone` off a number of the code of a module, in place. Raises ValueError where its code has no such
    number."""
    kind, method, now = type(module), name.partition(MARK)[0], number(module, name)
    code = _method(_with_code(kind), method)
    if code is None or now not in _read(code):
        raise ValueError(f"the code of {kind.__name__}.{method} does not have the number {now}, as that of the model "
                         "did that was pruned: build the dense model as it was")
    numbers = sorted({**_numbers_of(kind), name: now - gone}.items())
    narrowed = put_together(taken_apart(_held(kind))[0], (_with, *numbers), *_other_steps(kind))
    module.__class__ = narrowed if _held(kind) is kind else changed(kind.__bases__[0], narrowed)


def _held(kind: type[nn.Module]) -> type[nn.Module]:
    """The class itself, where layers stand in for parameters meanwhile."""
    held: type[nn.Module] = vars(kind).get("_before", kind)
    return held


def _with_code(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that has no more than the code of the module, and its numbers."""
    cls, steps = taken_apart(_held(kind))
    return put_together(cls, *(step for step in steps if step[0] is _with))


def _other_steps(kind: type[nn.Module]) -> list[tuple[Any, ...]]:
    return [step for step in taken_apart(_held(kind))[1] if step[0] is not _with]


def _numbers_of(kind: type[nn.Module]) -> Mapping[str, int]:
    numbers: Mapping[str, int] = getattr(kind, "_numbers", {}) if issubclass(kind, _OtherNumbers) else {}
    return numbers


def _method(kind: type[nn.Module], name: str) -> CodeType | None:
    """The code of a method; None where there is none that is written in Python and not decorated."""
    found = next((vars(cls)[name] for cls in kind.__mro__ if name in vars(cls)), None)
    return found.__code__ if isinstance(found, FunctionType) else None


@lru_cache(maxsize=4096)
def _read(code: CodeType) -> Mapping[int, int]:
    """The whole numbers that the code reads -> at how many places."""
    read = Counter(number for each in dis.get_instructions(code) if each.opcode in dis.hasconst
                   for number in _within(each.argval))
    constant = {number for value in code.co_consts for number in _within(value)}
    return {number: times for number, times in read.items() if number in constant}


def _within(value: object) -> list[int]:
    if isinstance(value, tuple | slice):
        return [number for each in _parts(value) for number in _within(each)]
    return [value] if type(value) is int else []


def _parts(value: tuple[Any, ...] | slice) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value.start, value.stop, value.step)


@cache
def _with(cls: type[Any], *numbers: tuple[str, int]) -> type[nn.Module]:
    """The class with other numbers in its methods."""
    methods: dict[str, dict[int, int]] = defaultdict(dict)
    for name, number in numbers:
        method, _, first = name.partition(MARK)
        methods[method][int(first)] = number
    functions = {method: _function(getattr(cls, method), changes) for method, changes in methods.items()}
    return made_class(_OtherNumbers, cls, _with, *numbers, _numbers=dict(numbers), **functions)


def _function(old: FunctionType, numbers: Mapping[int, int]) -> FunctionType:
    code = old.__code__.replace(co_consts=tuple(_replaced(value, numbers) for value in old.__code__.co_consts))
    if all(type(number) is int for number in numbers.values()):  # no mark
        code = with_source(old, code, numbers)
    return with_code(old, code, old.__closure__)


def _replaced(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, tuple | slice):
        parts = tuple(_replaced(each, numbers) for each in _parts(value))
        return parts if isinstance(value, tuple) else slice(*parts)
    return numbers.get(value, value) if type(value) is int else value
