"""The sizes that code asks a view, or zeros, for: wherever it says them."""

import ast
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

THROUGH = {"int", "tuple", "list", "Size"}  # functions that give back what they are given
_COUNTS = {"len", "size", "numel", "dim", "prod", "range"}
_WORDS = {"shape", "size", "sizes"}  # arguments that are sizes
_KEEP = {"to", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "expand", "expand_as", "repeat",
         "unsqueeze", "contiguous", "clone", "requires_grad_"}  # methods by which zeros stay what they are


def name_of(call: ast.Call) -> str:
    """Of the function or method that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def sizes_in(call: ast.Call, behind: int = 0) -> list[ast.expr]:
    """The sizes that a call says, one by one or all in one; behind: after so many arguments."""
    given = [each.value for each in call.keywords if each.arg in _WORDS] or call.args[behind:]
    if name_of(call) == "unflatten":
        given = given[-1:]  # behind the dimension
    return given[0].elts if len(given) == 1 and isinstance(given[0], ast.Tuple | ast.List) else given


def is_open(sizes: Sequence[ast.expr], node: ast.AST, tree: ast.AST, held: Callable[[ast.expr], Collection[Any]]
            ) -> bool:
    """Whether one of the sizes of a view may be -1, or how often another fits: it takes any number that divides.

    node: the other, where it stands. tree: the function that it stands in. held: an expression -> what it may be, as
    far as that is known.
    """
    return any(_may_be_open(size, ast.dump(node), tree, held, set()) for size in sizes)


def dims_of(node: ast.AST, sizes: Sequence[ast.expr], tree: ast.AST) -> set[tuple[int, int]]:
    """(dimension, how many there are) of which a part of some sizes is one; none where the code does not say that, as
    of a variable that holds several, or of tuples that are added. tree: the function that it stands in."""
    if any(isinstance(part, ast.Starred | ast.Tuple | ast.List) for size in sizes for part in ast.walk(size)):
        return set()
    names = {size.id for size in sizes if isinstance(size, ast.Name)}
    if any(isinstance(value, ast.Tuple | ast.List) for name in names for value in _set_to(name, tree)):
        return set()
    return {(number, len(sizes)) for number, size in enumerate(sizes) if any(part is node for part in ast.walk(size))}


def is_state(zeros: ast.expr, tree: ast.AST, parents: Mapping[ast.AST, ast.AST], calls_own: Callable[[ast.expr], bool]
             ) -> bool:
    """Whether zeros are what something begins with: returned, handed on, or held by a variable that may hold something
    else, too. Of other zeros, as those that are joined to something, any number may be right.

    calls_own: whether what is called is a module, or a function of the model's.
    """
    node: ast.AST = zeros
    while isinstance(parent := parents[node], ast.Tuple | ast.List | ast.keyword | ast.IfExp | ast.Attribute) or (
            isinstance(parent, ast.Call) and node is parent.func and name_of(parent) in _KEEP):
        node = parent
    if isinstance(parent, ast.Call):
        return node is not parent.func and calls_own(parent.func)
    if not isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr):
        return isinstance(parent, ast.Return)
    targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
    names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return len(names) == 0 or all(_holds_others(name, tree) for name in names)


def _holds_others(name: str, tree: ast.AST) -> bool:
    """Whether a variable is set at several places, to one thing or another, or has something written to it."""
    values = list(_set_to(name, tree))
    return len(values) > 1 or any(isinstance(value, ast.IfExp) for value in values) or any(
        isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == name
        for node in ast.walk(tree))


def _may_be_open(size: ast.AST, number: str, tree: ast.AST, held: Callable[[ast.expr], Collection[Any]], seen: set[str]
                 ) -> bool:
    match size:
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            return value == 1
        case ast.UnaryOp(ast.USub()) | ast.BinOp(ast.Constant(), ast.Sub()):
            return True
        case ast.BinOp(_, ast.FloorDiv(), right) if ast.dump(right) == number:
            return True
        case ast.Call() if name_of(size) in _COUNTS:
            return False
        case ast.Call() if name_of(size) not in THROUGH:
            return True  # nobody knows
        case ast.Name(name) if values := list(_set_to(name, tree)):
            known = name in seen
            seen.add(name)
            return not known and any(value is None or _may_be_open(value, number, tree, held, seen) for value in values)
        case ast.Name() | ast.Attribute():
            return any(type(each) is int and each == -1 for value in held(size) for each in _held_in(value))
        case ast.IfExp(_, body, orelse):
            parts: Sequence[ast.AST] = body, orelse
        case ast.Subscript(whole):
            parts = [whole]
        case ast.Call():
            parts = size.args
        case _:
            parts = list(ast.iter_child_nodes(size))
    return any(_may_be_open(part, number, tree, held, seen) for part in parts)


def _held_in(value: object) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)


def _set_to(name: str, tree: ast.AST) -> Iterator[ast.expr | None]:
    """What a function sets a variable to, or unpacks for it; None of an argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == name:
            yield None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For | ast.comprehension) else []
        value = node.iter if isinstance(node, ast.For | ast.comprehension) else getattr(node, "value", None)
        if value is not None and any(isinstance(each, ast.Name) and each.id == name
                                     for target in targets for each in ast.walk(target)):
            yield value
