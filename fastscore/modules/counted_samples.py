"""Whether a model's code goes another way by how many samples there are: `if len(x) > 4:`, `if x.shape[0] == 1:`."""

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cache
from types import FunctionType

from torch import nn

from fastscore.modules.reachable_code import functions_in, is_torchs, tree_of


def branches(model: nn.Module) -> bool:
    """Whether methods of its modules compare the first size of a tensor, or len(x), with a number of their own, and do
    one thing or another; whether there is anything, and checks that raise, are no such comparisons."""
    named = defaultdict[str, set[FunctionType]](set)
    for cls in {cls for module in model.modules() for cls in type(module).__mro__ if not is_torchs(cls)}:
        for name, value in vars(cls).items():
            named[name].update(functions_in(value))
    work, seen = ["forward"], {"forward"}
    while work:  # what forwards come to, by name
        for function in named.get(work.pop(), ()):
            names = set(function.__code__.co_names)
            if not names.isdisjoint({"shape", "size", "len"}) and _compares(function):
                return True
            work += names - seen
            seen |= names
    return False


@cache
def _compares(function: FunctionType) -> bool:
    if (tree := tree_of(function)) is None:
        return False
    more = {node.arg for at in ast.walk(tree) if isinstance(at, ast.arguments)
            for node in (at.vararg, at.kwarg) if node}
    names = set(_counts(tree))
    return any(_counted(one, names, more) and _own(other) for test in _tests(tree) for node in ast.walk(test)
               if isinstance(node, ast.Compare) for pair in [(node.left, node.comparators[0])]
               for one, other in (pair, pair[::-1]))


def _own(node: ast.expr) -> bool:
    """A number other than 0, or what a module holds."""
    return bool(node.value) and isinstance(node.value, int) if isinstance(node, ast.Constant) else \
        isinstance(node, ast.Attribute) and node.attr != "shape"


def _tests(tree: ast.AST) -> Iterator[ast.expr]:
    """By which the code does one thing or another."""
    for node in ast.walk(tree):
        taken = node.body.slice if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Subscript) else None
        if isinstance(taken, ast.Constant):
            continue  # outputs[1] if len(outputs) > 1 else None: of a tuple
        if isinstance(node, ast.IfExp | ast.While) or (
                isinstance(node, ast.If) and not (isinstance(node.body[-1], ast.Raise) and not node.orelse)):
            yield node.test


def _counts(tree: ast.AST) -> Iterator[str]:
    """Variables that hold the first size of a tensor: n = x.shape[0]; n, c, h, w = x.shape."""
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]:
        for target in node.targets:
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            if isinstance(first, ast.Name) and (_counted(node.value, (), ()) if first is target else
                                                _of_all(node.value)):
                yield first.id


def _of_all(node: ast.AST) -> bool:
    """x.shape, or x.size()."""
    if isinstance(node, ast.Call):
        return not node.args and isinstance(node.func, ast.Attribute) and node.func.attr == "size"
    return isinstance(node, ast.Attribute) and node.attr == "shape"


def _counted(node: ast.expr, names: Collection[str], more: Collection[str]) -> bool:
    """Whether an expression is the first size of a tensor, or one of these variables. more: no tensors, but *args."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Subscript):
        return _of_all(node.value) and isinstance(node.slice, ast.Constant) and node.slice.value == 0
    if not isinstance(node, ast.Call) or len(node.args) != 1:
        return False
    given = node.args[0]
    if isinstance(node.func, ast.Name):
        return node.func.id == "len" and isinstance(given, ast.Name) and given.id not in more
    return isinstance(node.func, ast.Attribute) and node.func.attr == "size" and \
        isinstance(given, ast.Constant) and given.value == 0
