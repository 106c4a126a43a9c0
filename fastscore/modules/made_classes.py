"""Classes that are made of a user's, while a program runs: its code, and what stands before it. Nobody can import them,
so that a module of one is copied and pickled as one of the user's class, and how its class was made of that.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


class Made:
    """What such classes have besides: the class that they were made of, and the function and what it takes beside that
    which made them."""

    _reads: type[nn.Module]
    _made_by: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls, steps = taken_apart(type(self))
        return _new, (cls, *steps), self.__dict__.copy()


def made_class(first: type[Made], cls: type[nn.Module], by: Callable[..., type[nn.Module] | None], *given: Any,
               **attributes: Any) -> type[nn.Module]:
    """A class that is `cls`, with `first` and `attributes` before it. by: `by(cls, *given)` is it."""
    return type(cls.__name__, (first, cls), {
        "_reads": cls, "_made_by": (by, *given), "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__, **attributes})


def taken_apart(cls: type[Any]) -> tuple[type[Any], list[tuple[Any, ...]]]:
    """(the user's class that a class was made of, what made it of that: functions, and what they take beside it)."""
    steps = []
    while "_made_by" in vars(cls):
        steps.append(cls._made_by)
        cls = cls._reads
    return cls, steps[::-1]


def put_together(cls: type[Any], *steps: tuple[Any, ...]) -> type[Any]:
    """A class made of a user's by these steps."""
    for by, *given in steps:
        cls = by(cls, *given) or cls
    return cls


def _new(cls: type[nn.Module], *steps: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = object.__new__(put_together(cls, *steps))
    return module
