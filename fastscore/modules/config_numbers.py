"""Lists of numbers in plain objects that modules hold, `self.config.hidden_sizes`. Others may hold the same object:
with fewer channels the module gets a copy of its own.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

MARK = ":"  # between the object and what it holds: `config:hidden_sizes`


def lists(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the lists, and tuples, of objects that a module holds, where both are called as `names` say."""
    names = set(names)
    for name in names & vars(module).keys():
        held = vars(module)[name]
        own: Any = getattr(held, "__dict__", None)
        known = type(own) is dict and not isinstance(held, nn.Module)  # a class has another kind
        for key in names & own.keys() if known else ():
            if isinstance(own[key], list | tuple):
                yield f"{name}{MARK}{key}", own[key]


def holder(module: nn.Module, name: str) -> tuple[Any, str]:
    """(what holds numbers of that name, its attribute): the module itself, or an object of its."""
    held, _, key = name.rpartition(MARK)
    return (vars(module).get(held), key) if held else (module, key)


def own_holder(module: nn.Module, name: str) -> tuple[Any, str]:
    """The same; the object is a copy that the module alone has from now on."""
    held = name.rpartition(MARK)[0]
    if held in vars(module):
        vars(module)[held] = copy.copy(vars(module)[held])
    return holder(module, name)
