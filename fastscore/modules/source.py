"""What a function says, as the file has it that it was written in."""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """lines: of the file, from number `first` on. indent: of the first of them. tree: what they say, without that."""

    lines: Sequence[str]
    first: int
    indent: int
    tree: ast.Module


def source_of(function: Any) -> Source | None:
    """What a function says; None where nothing says that, as of one that was not written in a file."""
    try:
        lines, first = inspect.getsourcelines(function)
        indent = len(lines[0]) - len(lines[0].lstrip())
        tree = ast.parse("".join(line[min(indent, len(line) - len(line.lstrip(" \t"))):] for line in lines))
    except (OSError, TypeError, SyntaxError):
        return None
    return Source(lines, first, indent, tree)


def tree_of(function: Any) -> ast.Module | None:
    """The same, as no more than what it says."""
    source = source_of(function)
    return None if source is None else source.tree
