"""Names that the code of a module has for its own attributes."""

import ast
import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TypeGuard

from fastscore.modules.reachable_code import functions_in, is_torchs, sets


def is_own(node: ast.AST, owner: str) -> TypeGuard[ast.Attribute]:
    """Whether it is an attribute of the module."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner


class Spelled(ast.NodeTransformer):
    """Has code take counts of heads of its module where it takes names that it has set to them, once: `heads =
    self.heads`, or `b, n, c, heads = *x.shape, self.heads`. What else a name stands for may be another thing later.

    cls: whose method it is. counts: what such attributes are usually called; what code divides by is one, too.
    """

    def __init__(self, function: ast.FunctionDef, owner: str, cls: type, counts: Collection[str]) -> None:
        nodes = list(ast.walk(function))
        set_to = Counter(each.arg for each in nodes if isinstance(each, ast.arg)) + Counter(
            each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load))
        divisors = {each.right.id for each in nodes if isinstance(each, ast.BinOp)
                    and isinstance(each.op, ast.FloorDiv) and isinstance(each.right, ast.Name)}
        self._named = {
            name: value for statement in function.body if isinstance(statement, ast.Assign)
            for name, value in _assigned(statement)
            if is_own(value, owner) and (value.attr in counts or name in divisors) and set_to[name] == 1
            and not _changes(cls, value.attr)}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The attribute, or the name as it is."""
        found = self._named.get(node.id) if isinstance(node.ctx, ast.Load) else None
        return node if found is None else ast.copy_location(ast.Attribute(found.value, found.attr, ast.Load()), node)


def _assigned(statement: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement sets, and to what: of several those behind all that it unpacks."""
    value = statement.value
    for target in statement.targets:
        pairs = zip(reversed(target.elts), reversed(value.elts), strict=False) if isinstance(target, ast.Tuple) and \
            isinstance(value, ast.Tuple) else [(target, value)]
        for one, other in itertools.takewhile(lambda pair: not isinstance(pair[0], ast.Starred)
                                              and not isinstance(pair[1], ast.Starred), pairs):
            if isinstance(one, ast.Name):
                yield one.id, other


def _changes(cls: type, attribute: str) -> bool:
    """Whether an attribute may be another thing after a method has run: a class computes it, or a method sets it."""
    kinds = [kind for kind in cls.__mro__ if not is_torchs(kind)]
    return any(hasattr(vars(kind).get(attribute), "__get__") for kind in kinds) or any(
        sets(function.__code__, attribute) for kind in kinds for name, value in vars(kind).items() if name != "__init__"
        for function in functions_in(value))
