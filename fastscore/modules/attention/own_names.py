"""Names that the code of a module has for its own attributes."""

import ast
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TypeGuard


def is_own(node: ast.AST, owner: str) -> TypeGuard[ast.Attribute]:
    """Whether it is an attribute of the module."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner


class Spelled(ast.NodeTransformer):
    """Has code take attributes of its module where it takes names that it has set to them, once: `heads = self.heads`,
    or `b, n, c, heads = *x.shape, self.heads`."""

    def __init__(self, function: ast.FunctionDef, owner: str) -> None:
        set_to = Counter(argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg))
        stored = set[str]()
        named = dict[str, ast.Attribute]()
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                set_to[node.id] += 1
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                stored.add(node.attr)
        for statement in function.body:
            for name, value in _assigned(statement) if isinstance(statement, ast.Assign) else ():
                if is_own(value, owner):
                    named[name] = value
        self._named = {name: value for name, value in named.items() if set_to[name] == 1 and value.attr not in stored}

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
