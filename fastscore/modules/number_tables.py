"""Numbers that a module keeps by names, `self.sizes["h"]`: in a dict, or in a tuple of (name, number)."""

import ast
import copy
from typing import Any

from torch import nn

from fastscore.modules.lines_run import Parents

_METHODS = {"get", "items", "values", "copy"}
_OF_EVERY = frozenset(vars(nn.Module()))  # what any module keeps


def entries(value: Any) -> dict[str, int]:
    """Name -> number, of those of a table that are called as attributes may be; nothing of what is none."""
    pairs = list(value.items()) if type(value) is dict else value if type(value) is tuple else ()
    if not all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
        return {}
    return {name: number for name, number in pairs
            if isinstance(name, str) and name.isidentifier() and type(number) is int}


def take_off(module: nn.Module, name: str, key: str, gone: int) -> None:
    """Make a number of a table less, in place of the module, in a table of its own.

    A module whose copies make what they keep of a few things (as einops's layers do: the table is one of them) keeps
    from now on what such a copy would.
    """
    held = vars(module)[name]
    vars(module)[name] = type(held)((dict(held) | {key: dict(held)[key] - gone}).items())
    if type(module).__setstate__ is not nn.Module.__setstate__:
        made = vars(copy.copy(module))
        vars(module).update({each: value for each, value in made.items() if each not in _OF_EVERY})


def taken_of(node: ast.AST, parents: Parents) -> tuple[ast.AST, str | None] | None:
    """(what takes numbers of a table, or list, the name of the only one); None where nothing does."""
    parent = parents[node]
    if isinstance(parent, ast.Subscript) and node is parent.value:
        taken: ast.expr = parent
        asked = [parent.slice]
    elif isinstance(parent, ast.Attribute) and parent.attr in _METHODS and isinstance(
            call := parents[parent], ast.Call) and parent is call.func:
        taken, asked = call, call.args[:1]
    else:
        return None
    names = [each.value for each in asked if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return taken, names[0] if names else None
