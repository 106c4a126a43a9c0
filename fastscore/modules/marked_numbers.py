"""Numbers that modules keep, or have in their code, marked for a run: what a function is given says whose it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from fastscore.modules import written_numbers

Place: TypeAlias = tuple[nn.Module, str]  # whose number, and its name: an attribute, or as written_numbers names it


class Marked(int):
    """A number as it was, which says where it is from; so do whole numbers that are computed from it."""

    places: frozenset[Place]

    @classmethod
    def of(cls, value: int, places: Iterable[Place]) -> "Marked":
        """The number, from these places."""
        number = cls(value)
        number.places = frozenset(places)
        return number


def _computed(name: str) -> Callable[[Marked, Any], Any]:
    def method(number: Marked, other: Any) -> Any:
        value = getattr(int, name)(number, other)
        places = number.places | (other.places if isinstance(other, Marked) else frozenset())
        return Marked.of(value, places) if type(value) is int else value

    return method


for _name in ("add", "sub", "mul", "floordiv"):
    for _side in ("", "r"):
        setattr(Marked, f"__{_side}{_name}__", _computed(f"__{_side}{_name}__"))


@contextmanager
def marked(places: Iterable[Place]) -> Iterator[None]:
    """In the block the numbers at these places are Marked."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, name in places:
            if written_numbers.MARK in name:
                before.append((module, name, type(module)))
                number = Marked.of(written_numbers.number(module, name), [(module, name)])
                module.__class__ = written_numbers.with_mark(module, name, number)
            else:
                held = vars(module)[name]
                before.append((module, name, held))
                vars(module)[name] = Marked.of(held, [(module, name)]) if isinstance(held, int) else type(held)(
                    Marked.of(each, [(module, name)]) for each in held)
        yield
    finally:
        for module, name, held in reversed(before):
            if isinstance(held, type):
                module.__class__ = held
            else:
                vars(module)[name] = held
