"""What a function says, as the file has it that it was written in."""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Source:
    """lines: of the file, from number `first` on. tree: what they say; its lines are numbered from 1, its columns are
    the file's."""

    lines: Sequence[str]
    first: int
    tree: ast.Module


def source_of(function: Any) -> Source | None:
    """What a function says; None where nothing says that, as of one that was not written in a file."""
    try:
        lines, first = inspect.getsourcelines(function)
        if not lines[0][0].isspace():
            return Source(lines, first, ast.parse("".join(lines)))
        tree = ast.parse("".join(["if 1:\n", *lines]))  # lines may begin before the first, as within brackets
    except (OSError, TypeError, SyntaxError):
        return None
    tree.body = tree.body[0].body  # type: ignore[attr-defined]
    ast.increment_lineno(tree, -1)
    return Source(lines, first, tree)


def tree_of(function: Any) -> ast.Module | None:
    """The same, as no more than what it says."""
    source = source_of(function)
    return None if source is None else source.tree


def method_of(tree: ast.Module, function: FunctionType) -> ast.FunctionDef | None:
    """A method as its tree has it, with its first argument called `self` in it, whatever it is called; None where that
    is no `def`."""
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef):
        return None
    first = function.__code__.co_varnames[:function.__code__.co_argcount][:1]
    for node in ast.walk(body):
        if isinstance(node, ast.Name) and node.id in first:
            node.id = "self"
    return body
