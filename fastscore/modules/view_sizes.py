"""The sizes that code asks a view, or zeros, for: wherever it says them."""

import ast
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

_WORDS = {"shape", "size", "sizes"}  # arguments that are sizes


def name_of(call: ast.Call) -> str:
    """Of the function or method that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def sizes_in(call: ast.Call, behind: int = 0) -> list[ast.expr]:
    """The sizes that a call says, one by one or all in one; behind: after so many arguments."""
    given = [each.value for each in call.keywords if each.arg in _WORDS] or call.args[behind:]
    if name_of(call) == "unflatten":
        given = given[-1:]  # behind the dimension
    return given[0].elts if len(given) == 1 and isinstance(given[0], ast.Tuple | ast.List) else given


def is_open(sizes: Sequence[ast.expr], tree: ast.AST, held: Callable[[ast.expr], Collection[Any]]) -> bool:
    """Whether one of the sizes of a view may be -1, so that it takes any number that divides.

    tree: the function that it stands in. held: an expression -> what it may be, as far as that is known.
    """
    return any(_may_be_open(size, tree, held, set()) for size in sizes)


def dims_of(node: ast.AST, sizes: Sequence[ast.expr], tree: ast.AST) -> set[tuple[int, int]]:
    """(dimension, how many there are) of which a part of some sizes is one; none where the code does not say that, as
    of a variable that holds several. tree: the function that it stands in."""
    if any(isinstance(size, ast.Starred) or (isinstance(size, ast.Name) and any(
            isinstance(value, ast.Tuple | ast.List) for value in _set_to(size.id, tree))) for size in sizes):
        return set()
    return {(number, len(sizes)) for number, size in enumerate(sizes) if any(part is node for part in ast.walk(size))}


def _may_be_open(size: ast.expr, tree: ast.AST, held: Callable[[ast.expr], Collection[Any]], seen: set[str]) -> bool:
    if isinstance(size, ast.UnaryOp):
        return isinstance(size.op, ast.USub) and getattr(size.operand, "value", 1) == 1
    if isinstance(size, ast.Tuple | ast.List | ast.Starred | ast.IfExp | ast.BinOp):
        sum_of_tuples = not isinstance(size, ast.BinOp) or isinstance(size.op, ast.Add)
        return sum_of_tuples and any(_may_be_open(each, tree, held, seen) for each in ast.iter_child_nodes(size)
                                     if isinstance(each, ast.expr))
    if isinstance(size, ast.Name) and (values := list(_set_to(size.id, tree))):
        known = size.id in seen
        seen.add(size.id)
        return not known and any(value is None or _may_be_open(value, tree, held, seen) for value in values)
    return any(value == -1 or (isinstance(value, tuple | list) and -1 in value) for value in held(size))


def _set_to(name: str, tree: ast.AST) -> Iterator[ast.expr | None]:
    """What a function sets a variable to; None of an argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == name:
            yield None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For | ast.comprehension) else []
        for target in targets:
            if any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(target)):
                value = node.iter if isinstance(node, ast.For | ast.comprehension) else getattr(node, "value", None)
                if value is not None and not (isinstance(target, ast.Tuple) and not isinstance(value, ast.Tuple)):
                    yield value
