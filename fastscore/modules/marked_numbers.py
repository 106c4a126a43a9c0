"""Numbers that modules keep, or have in their code, marked for a run: what a function is given says whose it is."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeAlias

from torch import nn

from fastscore.modules import config_numbers, written_numbers

# whose number, and its name: an attribute, or as written_numbers or config_numbers names it
Place: TypeAlias = tuple[nn.Module, str]


class Marked(int):
    """A number as it was, which says where it is from, and how many it gains for one more there; so do whole numbers
    that are computed from it."""

    slopes: Mapping[Place, Fraction]

    @classmethod
    def of(cls, value: int, slopes: Mapping[Place, Fraction]) -> "Marked":
        """The number, with these slopes."""
        number = cls(value)
        number.slopes = slopes
        return number

    @classmethod
    def at(cls, value: int, place: Place) -> "Marked":
        """The number of a place."""
        return cls.of(value, {place: Fraction(1)})


def _computed(name: str, gains: Callable[[Any, Any], tuple[Fraction, Fraction]]) -> Callable[[Marked, Any], Any]:
    """A method of Marked. gains: two numbers -> what the result gains for one more of each."""
    def method(number: Marked, other: Any) -> Any:
        value = getattr(int, name)(number, other)
        if type(value) is not int:
            return value
        slopes: dict[Place, Fraction] = {}
        for each, gain in zip((number, other), gains(int(number), int(other)), strict=True):
            for place, slope in each.slopes.items() if isinstance(each, Marked) else ():
                slopes[place] = slopes.get(place, Fraction(0)) + gain * slope
        return Marked.of(value, slopes)

    return method


_ONE, _NONE = Fraction(1), Fraction(0)
for _name, _gains in {
        "add": lambda a, b: (_ONE, _ONE), "radd": lambda a, b: (_ONE, _ONE),
        "sub": lambda a, b: (_ONE, -_ONE), "rsub": lambda a, b: (-_ONE, _ONE),
        "mul": lambda a, b: (Fraction(b), Fraction(a)), "rmul": lambda a, b: (Fraction(b), Fraction(a)),
        "floordiv": lambda a, b: (Fraction(1, b), _NONE), "rfloordiv": lambda a, b: (_NONE, Fraction(1, a))}.items():
    setattr(Marked, f"__{_name}__", _computed(f"__{_name}__", _gains))


@contextmanager
def marked(places: Iterable[Place]) -> Iterator[None]:
    """In the block the numbers at these places are Marked."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, name in places:
            if written_numbers.MARK in name:
                before.append((module, name, type(module)))
                number = Marked.at(written_numbers.number(module, name), (module, name))
                module.__class__ = written_numbers.with_mark(module, name, number)
            else:
                first = name.partition(config_numbers.MARK)[0]
                before.append((module, first, vars(module)[first]))
                holder, key = config_numbers.own_holder(module, name)
                held = vars(holder)[key]
                vars(holder)[key] = Marked.at(held, (module, name)) if isinstance(held, int) else type(held)(
                    Marked.at(each, (module, name)) for each in held)
        yield
    finally:
        for module, name, held in reversed(before):
            if isinstance(held, type):
                module.__class__ = held
            else:
                vars(module)[name] = held
