"""Branches that constructors decide: what code asks there of a module, no call changes."""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

from torch import nn

from fastscore.modules.lines_run import Parents, outwards
from fastscore.modules.source import method_of, tree_of
from fastscore.modules.tensor_expressions import value_of

Asked: TypeAlias = tuple[tuple[ast.expr, bool], ...]  # conditions, and the answer that leads somewhere
ENDS = (ast.Return, ast.Continue, ast.Break)


def settled(test: ast.expr, answer: bool, local: Sequence[str]) -> Iterator[tuple[ast.expr, bool]]:
    """The parts of a condition that constructors decide, and what they must be for such an answer."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from settled(test.operand, not answer, local)
    elif isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) is answer:
        for each in test.values:
            yield from settled(each, answer, local)
    elif _is_settled(test, local) or (isinstance(test, ast.BoolOp) and all(_is_settled(each, local)
                                                                           for each in test.values)):
        yield test, answer


def _is_settled(test: ast.expr, local: Sequence[str]) -> bool:
    """Whether a condition is a flag of an object, or compares what one holds with names, with None, or with a number
    that counts nothing: `self.norm == "layer"`, `self.short is None`, `self.share > 0.0`."""
    if isinstance(test, ast.Call):
        kind = isinstance(test.func, ast.Name) and test.func.id == "isinstance" and bool(of_self(test.args[0]))
        return kind or flag_in(test) is not None
    if not isinstance(test, ast.Compare):
        return flag_in(test) is not None
    of_shares = all(isinstance(each, ast.Constant) and isinstance(each.value, float) for each in test.comparators)
    return (of_shares or isinstance(test.ops[0], ast.Is | ast.IsNot | ast.Eq | ast.NotEq | ast.In | ast.NotIn)) and \
        of_self(test.left) == [test.left] and all(
            isinstance(part, ast.Tuple | ast.List | ast.expr_context | ast.Attribute)
            or (isinstance(part, ast.Name) and part.id not in local)
            or (isinstance(part, ast.Constant) and isinstance(part.value, str | float))
            or is_none(part)
            for each in test.comparators for part in ast.walk(each))


def flag_in(test: ast.expr) -> tuple[ast.expr, str] | None:
    """The attribute that a condition is of `self`, or of what it keeps, and of which of these, if it is one:
    `self.shared`, `getattr(self, "add", False)`, `self.config.shared`."""
    whole: ast.expr | None
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "getattr":
        whole, name = test.args[0], getattr(test.args[1], "value", None)
    else:
        whole, name = (test.value, test.attr) if isinstance(test, ast.Attribute) else (None, None)
    owner = whole.value if isinstance(whole, ast.Attribute) else whole
    return (whole, name) if whole and isinstance(owner, ast.Name) and owner.id == "self" and isinstance(name, str) \
        else None


def may_be(test: ast.expr, answer: bool, names: Mapping[str, Any], around: dict[str, Any],
           changes: Callable[[str], bool]) -> bool:
    """Whether a condition has that answer, or may come to it: a flag that only the class has, training, what the class
    computes, or a variable that is None until something is kept there. changes: whether code that is no constructor's
    may set an attribute of such a name."""
    if isinstance(test, ast.BoolOp):
        some = all if isinstance(test.op, ast.And) is answer else any
        return some(may_be(each, answer, names, around, changes) for each in test.values)
    flag = flag_in(test)
    held = [flag] if flag is not None else [
        (each.value, each.attr) for each in ast.walk(_asked_of(test)) if isinstance(each, ast.Attribute)]
    decided = not any(changes(name) or _is_computed(value_of(owner, names, around), name) for owner, name in held)
    if flag is not None:
        owner = value_of(flag[0], names, around)
        decided &= flag[1] != "training" and flag[1] in getattr(owner, "__dict__", ())
    if isinstance(test, ast.Compare) and any(isinstance(getattr(each, "value", None), float)
                                             for each in test.comparators):  # what counts channels may become less
        decided &= isinstance(value_of(test.left, names, around), float)
    if isinstance(test, ast.Compare) and (any(map(is_none, test.comparators)) or isinstance(test.left, ast.Subscript)):
        decided &= isinstance(value_of(test.left, names, around), nn.Module)
    return not decided or bool(value_of(test, names, around)) is answer


def _asked_of(test: ast.expr) -> ast.expr:
    """What a comparison, or isinstance(), is of."""
    return test.left if isinstance(test, ast.Compare) else test.args[0] if isinstance(test, ast.Call) else test


def _is_computed(owner: object, name: str) -> bool:
    """Whether an attribute is a property, or the like."""
    return hasattr(inspect.getattr_static(type(owner), name, None), "__get__")


def never_reads(function: FunctionType, module: nn.Module, key: str, changes: Callable[[str], bool]) -> bool:
    """Whether a module's constructor has ruled out all branches of a method in which it reads its attribute `key`.
    changes: as in may_be."""
    tree = tree_of(function)
    body = None if tree is None else method_of(tree, function)
    if body is None or not body.args.args:
        return False
    local = function.__code__.co_varnames + function.__code__.co_freevars
    return not any(all(may_be(*each, {"self": module}, function.__globals__, changes) for each in asked)
                   for asked in _reads(body.body, key, (), local))


def _reads(statements: Sequence[ast.stmt], key: str, asked: Asked, local: Sequence[str]) -> Iterator[Asked]:
    """What is asked before each place where code has an attribute of that name."""
    for statement in statements:
        yield from _reads_in(statement, key, asked, local)
        if isinstance(statement, ast.If) and isinstance(statement.body[-1], ENDS) and not statement.orelse:
            asked = (*asked, *settled(statement.test, False, local))


def _reads_in(node: ast.AST, key: str, asked: Asked, local: Sequence[str]) -> Iterator[Asked]:
    if getattr(node, "attr", getattr(node, "value", None)) == key:  # or by its name, getattr(self, "scale")
        yield asked
    for field, value in ast.iter_fields(node):
        chosen = isinstance(node, ast.If | ast.IfExp) and field != "test"
        within = (*asked, *settled(node.test, field == "body", local)) if chosen else asked  # type: ignore[attr-defined]
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield from _reads(value, key, within, local)
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from _reads_in(each, key, within, local)


def is_ruled_out(node: ast.Attribute, parents: Parents, function: FunctionType, module: nn.Module,
                 changes: Callable[[str], bool]) -> bool:
    """Whether what a method reads of `self` there stands in a branch that the constructor of a module, which is this
    `self`, has ruled out. changes: as in may_be."""
    before: ast.AST = node
    local = function.__code__.co_varnames + function.__code__.co_freevars
    for each in outwards(node, parents) if isinstance(node.value, ast.Name) and node.value.id == "self" else ():
        if isinstance(each, ast.If | ast.IfExp) and before is not each.test:
            body = each.body if isinstance(each, ast.If) else [each.body]
            if not all(may_be(*asked, {"self": module}, function.__globals__, changes)
                       for asked in settled(each.test, before in body, local)):
                return True
        before = each
    return False


def of_self(node: ast.expr) -> list[ast.expr]:
    """What `self` holds that an expression reads: `self.scale`, `self.heads[1]`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return [node]
    if isinstance(node, ast.Attribute | ast.Subscript) and (inner := of_self(node.value)):
        return [node] if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) else inner
    if isinstance(node, ast.BinOp):
        return [*of_self(node.left), *of_self(node.right)]
    return of_self(node.func.value) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
