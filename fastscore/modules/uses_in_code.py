"""Reading code for what it does, where it may be passed by, with tensors that may hold channels."""

import ast
import copy
import dis
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

from fastscore.modules.channel_uses import Position, Use, is_size, is_statistic, tensors_in
from fastscore.modules.reachable_code import functions_in, is_torchs
from fastscore.modules.settled_branches import ENDS, Asked, is_none, of_self, settled
from fastscore.modules.source import method_of, source_of
from fastscore.modules.tensor_expressions import Step, held_by, inlined, substituted

_OF_THEIR_OWN = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)  # code objects
_CHOICES = (ast.If, ast.While, ast.For, ast.Try, ast.ExceptHandler, ast.With, ast.match_case)
_COMPUTING = (ast.BinOp, ast.Call, ast.Compare, ast.Subscript, ast.UnaryOp)  # an instruction each
_DEEP = 3  # functions that are looked into from one another


@lru_cache(maxsize=10000)
def uses_in(function: FunctionType, kind: type | None, depth: int = 0) -> tuple[Use, ...]:
    """What a function does with variables that would mean their channels, if they held them there. kind: the class
    whose method it is, if it is one."""
    if not depth and not any("JUMP" in each.opname for each in dis.get_instructions(function.__code__)):
        return ()  # no part of which is passed by
    source = source_of(function)
    static = kind is None or isinstance(inspect.getattr_static(kind, function.__name__, None), staticmethod)
    body = None if source is None else source.tree.body[0] if static else method_of(source.tree, function)
    if source is None or not isinstance(body, ast.FunctionDef):
        return ()
    ast.increment_lineno(source.tree, max(source.first, 1) - 1)
    return tuple(_Reader(function, kind, source.tree, depth).read(body))


class _Reader:
    """Reads what a function says, statement by statement: see uses_in."""

    def __init__(self, function: FunctionType, kind: type | None, tree: ast.AST, depth: int) -> None:
        self._function, self._kind, self._depth = function, kind, depth
        halves = [target for each in ast.walk(tree) if isinstance(each, ast.Assign) and isinstance(
            each.value, ast.BinOp) and isinstance(each.value.op, ast.FloorDiv) and is_size(each.value.left)
            for target in each.targets]
        counts = [each.target for each in ast.walk(tree) if isinstance(each, ast.For | ast.comprehension)]
        self._local = frozenset(function.__code__.co_varnames + function.__code__.co_cellvars)
        self._in_training = 0  # conditions around that ask for it: layers that run then are traced so
        self._tree = tree
        self._loops = [each for each in ast.walk(tree) if isinstance(each, ast.For) and _counts_of_self(each)]
        self._parts = frozenset(each.id for each in (*halves, *counts) if isinstance(each, ast.Name))

    def read(self, body: ast.FunctionDef) -> Iterator[Use]:
        yield from self._block(body.body, (), (), False, ())

    def _block(self, statements: Sequence[ast.stmt], lines: tuple[int, ...], steps: tuple[Step, ...],
               chosen: bool, asked: Asked) -> Iterator[Use]:
        for statement in statements:
            yield from self._in(statement, (*lines, statement.lineno), steps, chosen, asked, None)
            steps = (*steps, *_assigned(statement))
            if isinstance(statement, ast.If) and any(isinstance(each, ENDS) for each in ast.walk(statement)):
                lines, chosen = (*lines, statement.lineno), True
                if isinstance(statement.body[-1], ENDS) and not statement.orelse:
                    asked = (*asked, *self._asked(statement, False))

    def _asked(self, node: Any, answer: bool) -> Asked:
        """Of a choice, what constructors have decided of it: what runs does not change that."""
        local = self._function.__code__.co_varnames + self._function.__code__.co_freevars
        return tuple(settled(node.test, answer, local)) if isinstance(node, ast.If | ast.IfExp) else ()

    def _in(self, node: Any, lines: tuple[int, ...], steps: tuple[Step, ...], chosen: bool, asked: Asked,
            place: Position | None) -> Iterator[Use]:
        """chosen: whether it may be passed by. place: of a loop within an expression that it is in."""
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            return
        here = place or _position(node)
        training = isinstance(node, ast.If | ast.IfExp) and any(
            isinstance(each, ast.Attribute) and each.attr == "training" for each in ast.walk(node.test))
        self._in_training += training
        if isinstance(node, _OF_THEIR_OWN):
            place = here
        for field, value in ast.iter_fields(node):
            within = asked if field == "test" else (*asked, *self._asked(node, field == "body"))
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                before = (*lines, node.test.lineno) if isinstance(node, ast.If | ast.While) else lines
                yield from self._block(value, before, steps, chosen or isinstance(node, _CHOICES), within)
                continue
            may = chosen or (isinstance(node, ast.IfExp | ast.BoolOp) and field != "test") or place is not None
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield from self._in(each, lines, steps, may, within, place)
        self._in_training -= training
        if (chosen or self._depth) and here is not None:
            yield from (use for use in self._uses(node, here, lines, steps, asked)
                        if use.by is None or not self._in_training)

    def _uses(self, node: Any, position: Position, lines: tuple[int, ...], steps: tuple[Step, ...], asked: Asked
              ) -> Iterator[Use]:
        def use(tensor: ast.expr, by: ast.expr | None = None, within: Use | None = None) -> Use:
            inner = () if within is None else within.asked
            alike = () if by is not None or within is not None else tuple(self._alike(node))
            return Use(node, position, tensor, lines, steps, self._parts, self._function, (*asked, *inner), by, within,
                       alike)

        if isinstance(node, _COMPUTING):
            yield from self._of_before(node, position, steps, asked)
        whole = [each for each in tensors_in(node, self._function.__globals__) if held_by(each)]
        side_by_side = len(whole) > 1 and whole[0] not in node.args  # parts of one variable, put together again
        if not side_by_side or len({_variables(each, steps) for each in whole}) > 1:
            yield from (use(each) for each in whole if not _is_summed_with_own(node, each))
        if isinstance(node, ast.BinOp):
            sizes = ast.copy_location(ast.BinOp(node.left, node.op, inlined(node.right, steps, 0)), node)
            sized = [] if whole else [each for each in tensors_in(sizes, {}) if held_by(each)]
            yield from (Use(sizes, position, each, lines, steps, self._parts, self._function, asked) for each in sized)
            for one, other in ((node.left, node.right), (node.right, node.left)):
                of_others = held_by(other) and not isinstance(node.op, ast.MatMult) and \
                    _variables(other, steps).isdisjoint(_variables(one, steps))
                meeting = [other] if of_others else of_self(other)
                yield from (use(one, each) for each in meeting if held_by(one))
        if not isinstance(node, ast.Call):
            return
        given = [*node.args, *(each.value for each in node.keywords)]
        args = [each for each in given if held_by(each)]
        yield from (use(one, each) for one in args for other in given for each in of_self(other) if other is not one)
        if (called := self._called(node.func)) is None:
            if of_self(node.func) and not isinstance(node.func, ast.Call):
                yield from (use(each, node.func) for each in args)
        else:
            yield from (use(tensor, by, inner) for tensor, by, inner in self._within(node, called))

    def _within(self, call: ast.Call, called: FunctionType) -> Iterator[tuple[ast.expr, ast.expr | None, Use]]:
        """What a function that is called makes of tensors: these, and what meets them, as it is given them."""
        names = called.__code__.co_varnames[:called.__code__.co_argcount + called.__code__.co_kwonlyargcount]
        bound = isinstance(call.func, ast.Attribute) and not isinstance(
            inspect.getattr_static(self._kind, call.func.attr, None), staticmethod)
        put = dict(zip(names[bound:], call.args, strict=False))
        put |= {each.arg: each.value for each in call.keywords if each.arg}
        kind = self._kind if isinstance(call.func, ast.Attribute) else None
        for inner in uses_in(called, kind, self._depth + 1) if self._depth < _DEEP else ():
            inside = inlined(inner.tensor, inner.steps, 0)
            by = None if inner.by is None else inlined(inner.by, inner.steps, 0)
            if held_by(inside) | (set() if by is None else held_by(by)) <= put.keys() and \
                    held_by(tensor := substituted(inside, put)):
                yield tensor, None if by is None else substituted(by, put), inner

    def _of_before(self, node: ast.AST, position: Position, steps: tuple[Step, ...], asked: Asked) -> Iterator[Use]:
        """Statistics that the variables of an expression were computed of before. Their own variables are looked up
        where that was, as later ones may hold something else: `x = x.mean(1)`."""
        around = self._function.__globals__
        work, seen = list[tuple[ast.AST, tuple[Step, ...], int]]((name, steps, 0) for name in _read(node)), set[int]()
        while work:
            value, before, line = work.pop()
            for each in ast.walk(value):
                if is_statistic(each, around):
                    yield from (Use(each, position, tensor, (line,), before, self._parts, self._function, asked)
                                for tensor in tensors_in(each, around) if held_by(tensor))
                called = self._called(each.func) if isinstance(each, ast.Call) else None
                for tensor, _, inner in self._within(each, called) if isinstance(each, ast.Call) and called else ():
                    if is_statistic(inner.innermost.node, inner.innermost.function.__globals__):  # as if it stood here
                        made = ast.copy_location(copy.copy(inner.innermost.node), each)
                        yield Use(made, position, tensor, (line,), before, self._parts, self._function, asked)
                at = next((at for at in reversed(range(len(before))) if isinstance(each, ast.Name)
                           and before[at][1] == each.id), None)
                if at is not None and at not in seen:
                    seen.add(at)
                    if not any(isinstance(part, ast.IfExp) for part in ast.walk(before[at][2])):  # read by itself
                        work.append((before[at][2], before[:at], before[at][0]))

    def _alike(self, node: Any) -> Iterator[Position]:
        """Where another loop over as many indexes the same by its variable, of one that only indexes by it: the same
        things, and a state that it is given beside them."""
        for loop in self._loops if isinstance(node, ast.Subscript) else ():
            own = _indexed(loop)
            if own is None or (place := next((place for place, nodes in own.items() if node in nodes), None)) is None:
                continue
            for other in self._loops:
                if other is loop or ast.dump(other.iter) != ast.dump(loop.iter) or (others := _indexed(other)) is None:
                    continue
                beside = [nodes[0] for key, nodes in own.items() if key not in others]
                if all(isinstance(each.value, ast.Name) and self._is_given(each.value.id) for each in beside):
                    yield from (at for each in others.get(place, ()) if (at := _position(each)))

    def _is_given(self, name: str) -> bool:
        """Whether a variable holds nothing but what the function is given, or methods of such a thing return."""
        code = self._function.__code__
        given = code.co_varnames[1:code.co_argcount + code.co_kwonlyargcount]
        values = list[ast.expr]()
        for each in ast.walk(self._tree):
            if isinstance(each, ast.Name) and each.id == name and isinstance(each.ctx, ast.Store):
                found = [value for node in ast.walk(self._tree) if isinstance(node, ast.Assign)
                         for line, target, value in _assigned(node) if target == name and line == each.lineno]
                if not found:
                    return False
                values += found
        for value in values:
            if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Tuple):  # one, two = None, None
                value = value.value.elts[value.slice.value]  # type: ignore[attr-defined]
            method = value.func if isinstance(value, ast.Call) else None
            if not is_none(value) and not (isinstance(method, ast.Attribute) and isinstance(method.value, ast.Name)
                                           and method.value.id in given):
                return False
        return bool(values) or name in given

    def _called(self, func: ast.expr) -> FunctionType | None:
        """The function that is called, of the same file, or of the same object."""
        found: Any = None
        if isinstance(func, ast.Name) and func.id not in self._local:
            found = self._function.__globals__.get(func.id)
            found = found if getattr(found, "__globals__", None) is self._function.__globals__ else None
        elif isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self":
            found = inspect.getattr_static(self._kind, func.attr, None) if self._kind is not None else None
        return next((each for each in functions_in(found) if not is_torchs(each)), None)


def _read(node: ast.AST) -> Iterator[ast.Name]:
    """Variables that an expression computes with, but for those of the expressions in it that compute."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.Name):
            yield each
        elif not isinstance(each, _COMPUTING):
            yield from _read(each)


def _counts_of_self(loop: ast.For) -> bool:
    """Whether a loop is over as many as `self` holds a number of: `for head in range(self.num_heads)`."""
    call = loop.iter
    if not isinstance(loop.target, ast.Name) or not isinstance(call, ast.Call) or len(call.args) != 1:
        return False
    return getattr(call.func, "id", "") == "range" and of_self(call.args[0]) == call.args


def _indexed(loop: ast.For) -> dict[tuple[str, int], list[ast.Subscript]] | None:
    """(what a loop indexes by its variable, the dimension) -> where; None where the variable is for something else,
    too, or where one turn tells on the next."""
    found: dict[tuple[str, int], list[ast.Subscript]] = {}
    body = [node for statement in loop.body for node in ast.walk(statement)]
    seen = 0
    for node in body:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            at = next((number for number, each in enumerate(parts) if not isinstance(each, ast.Slice)), 0)
            if isinstance(parts[at], ast.Name) and parts[at].id == loop.target.id:  # type: ignore[attr-defined]
                seen += 1
                found.setdefault((ast.dump(node.value), at), []).append(node)
    names = sum(isinstance(node, ast.Name) and node.id == loop.target.id for node in body)  # type: ignore[attr-defined]
    return found if names == seen and not _carries(body) else None


def _carries(body: Sequence[ast.AST]) -> bool:
    """Whether a loop ends early, or reads in one turn what another has made: lists are appended to alone."""
    variables = sorted((node for node in body if isinstance(node, ast.Name)), key=lambda node: node.lineno)
    stored = {node.id for node in variables if isinstance(node.ctx, ast.Store)}
    first = {node.id: node for node in reversed(variables)}
    lists = [node.value for node in body if isinstance(node, ast.Attribute) and node.attr == "append"]
    appended = {each.id for each in lists if isinstance(each, ast.Name)}
    return any(isinstance(node, ast.AugAssign | ast.Break | ast.Continue | ast.Return | ast.NamedExpr)
               or (isinstance(node, ast.Assign) and not stored.isdisjoint(
                   {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)} & {
                       each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}))
               or (isinstance(node, ast.Name) and node.id in appended and node not in lists)
               for node in body) or any(first[name].lineno < min(
                   node.lineno for node in variables if node.id == name and isinstance(node.ctx, ast.Store))
                   for name in stored)


def _position(node: ast.AST) -> Position | None:
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset or 0) \
        if isinstance(node, ast.expr) else None


def _assigned(statement: ast.stmt) -> Iterator[Step]:
    """What a statement assigns to variables."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                yield statement.lineno, target.id, statement.value
            elif isinstance(target, ast.Tuple):
                for number, each in enumerate(target.elts):
                    if isinstance(each, ast.Name):
                        part = ast.Subscript(statement.value, ast.Constant(number), ast.Load())
                        yield statement.lineno, each.id, part
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        yield statement.lineno, statement.target.id, ast.BinOp(
            ast.Name(statement.target.id, ast.Load()), statement.op, statement.value)


def _is_summed_with_own(node: Any, tensor: ast.expr) -> bool:
    """Whether a sum of products, as einsum computes it, is of a tensor and of one that `self` holds: which that is
    decides."""
    given = node.args[1:] if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "einsum" else []
    return len(given) == 2 and any(of_self(each) for each in given if each is not tensor)


def _variables(node: ast.expr, steps: Sequence[Step]) -> frozenset[str]:
    """Those that an expression is of, before these assignments if that can be told."""
    return frozenset(held_by(inlined(node, steps, 0)) or held_by(node))
