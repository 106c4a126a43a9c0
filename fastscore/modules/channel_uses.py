"""What code says of a variable that would mean its channels, if it held them there: how many there are, or which."""

import ast
import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastscore.modules.reachable_code import is_torchs
from fastscore.modules.tensor_expressions import Step, held_by, inlined, substituted

# that run along a dimension, or several: of fewer channels they make something else -> where it is said, if not first
_ALONG = dict.fromkeys(("flip", "softmax", "log_softmax", "softmin", "logsumexp", "mean", "std", "var", "amax", "amin",
                        "median", "sort", "argsort", "cumprod", "cumsum", "sum", "prod", "max", "min", "argmax",
                        "argmin"), 0) | {"roll": 1, "topk": 1, "norm": 1, "normalize": 1}
_OF_ALL = {"mean", "std", "var", "median"}  # along all dimensions, where none is said
_DEFAULTS = {"normalize": 1, "glu": -1}  # where they run along one, if none is said
_FIRST_OF_IMAGES = {"group_norm", "pixel_shuffle", "channel_shuffle"}  # that take the second dimension for channels
_PARTS = {"chunk", "split", "unflatten", "view", "reshape"}
_CALLED = {*_ALONG, *_DEFAULTS, *_FIRST_OF_IMAGES, *_PARTS}
_OF_THEIR_OWN = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)  # code objects
_CHOICES = (ast.If, ast.While, ast.For, ast.Try, ast.With)
_ENDS = (ast.Return, ast.Continue, ast.Break)
_DEEP = 3  # functions that are looked into from one another
Dims = Mapping[int, Tensor]  # dimension along which channels lie -> where those of a unit do, bool [size]
Position = tuple[int, int | None, int, int]  # of an instruction: lines, and columns


@dataclass(frozen=True, eq=False)
class Use:
    """What a function makes of a tensor. position: of it in the file. tensor: an expression of what variables hold,
    where it stands. lines: that come before, each condition that it depends on, outwards in: the last of them that runs
    is where the variables are looked up. steps: assignments that come before. parts: variables that hold a part of a
    size, or count. within: what is done with it, where a function that is called there does it. by: an expression of a
    module that is called on it, or of a tensor that a module holds and that meets it.
    """

    node: Any
    position: Position
    tensor: ast.expr
    lines: tuple[int, ...]
    steps: tuple[Step, ...]
    parts: frozenset[str]
    function: FunctionType
    by: ast.expr | None = None
    within: "Use | None" = None

    @property
    def innermost(self) -> "Use":
        """Itself, or what a function that is called there does."""
        return self if self.within is None else self.within.innermost

    @cached_property
    def tensors(self) -> Mapping[int, ast.expr]:
        """Line -> the tensor as an expression of what variables hold before that line runs."""
        return {line: inlined(self.tensor, self.steps, line) for line in self.lines}


@lru_cache(maxsize=10000)
def uses_in(function: FunctionType, kind: type | None, depth: int = 0) -> tuple[Use, ...]:
    """What a function does with variables that would mean their channels, if they held them there. kind: the class
    whose method it is, if it is one."""
    if not depth and not any("JUMP" in each.opname for each in dis.get_instructions(function.__code__)):
        return ()  # no part of which is passed by
    try:
        lines, first = inspect.getsourcelines(function)
        indent = len(lines[0]) - len(lines[0].lstrip())
        tree = ast.parse("".join(line[indent:] if line.strip() else "\n" for line in lines))
    except (OSError, TypeError, SyntaxError):  # of which nothing says what it does
        return ()
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef):
        return ()
    ast.increment_lineno(tree, max(first, 1) - 1)
    return tuple(_Reader(function, kind, tree, indent, depth).read(body))


class _Reader:
    """Reads what a function says, statement by statement: see uses_in."""

    def __init__(self, function: FunctionType, kind: type | None, tree: ast.AST, indent: int, depth: int) -> None:
        self._function, self._kind, self._indent, self._depth = function, kind, indent, depth
        halves = [target for each in ast.walk(tree) if isinstance(each, ast.Assign) and isinstance(
            each.value, ast.BinOp) and isinstance(each.value.op, ast.FloorDiv) and _is_size(each.value.left)
            for target in each.targets]
        counts = [each.target for each in ast.walk(tree) if isinstance(each, ast.For | ast.comprehension)]
        self._in_training = 0  # conditions around that ask for it: layers that run then are traced so
        self._parts = frozenset(each.id for each in (*halves, *counts) if isinstance(each, ast.Name))

    def read(self, body: ast.FunctionDef) -> Iterator[Use]:
        yield from self._block(body.body, (), (), None)

    def _block(self, statements: Sequence[ast.stmt], lines: tuple[int, ...], steps: tuple[Step, ...],
               chosen: bool | None) -> Iterator[Use]:
        for statement in statements:
            yield from self._in(statement, (*lines, statement.lineno), steps, bool(chosen), None)
            steps = (*steps, *_assigned(statement))
            if isinstance(statement, ast.If) and any(isinstance(each, _ENDS) for each in ast.walk(statement)):
                lines, chosen = (*lines, statement.lineno), True

    def _in(self, node: Any, lines: tuple[int, ...], steps: tuple[Step, ...], chosen: bool,
            place: Position | None) -> Iterator[Use]:
        """chosen: whether it may be passed by. place: of a loop within an expression that it is in."""
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            return
        here = place or _position(node, self._indent)
        training = isinstance(node, ast.If | ast.IfExp) and any(
            isinstance(each, ast.Attribute) and each.attr == "training" for each in ast.walk(node.test))
        self._in_training += training
        if isinstance(node, _OF_THEIR_OWN):
            place = here
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                before = (*lines, node.test.lineno) if isinstance(node, ast.If | ast.While) else lines
                yield from self._block(value, before, steps, chosen or isinstance(node, _CHOICES))
                continue
            may = chosen or (isinstance(node, ast.IfExp | ast.BoolOp) and field != "test") or place is not None
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield from self._in(each, lines, steps, may, place)
        self._in_training -= training
        if (chosen or self._depth) and here is not None:
            yield from (use for use in self._uses(node, here, lines, steps) if use.by is None or not self._in_training)

    def _uses(self, node: Any, position: Position, lines: tuple[int, ...], steps: tuple[Step, ...]) -> Iterator[Use]:
        def use(tensor: ast.expr, by: ast.expr | None = None, within: Use | None = None) -> Use:
            return Use(node, position, tensor, lines, steps, self._parts, self._function, by, within)

        yield from (use(whole) for whole in _tensors(node) if held_by(whole))
        if isinstance(node, ast.BinOp):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                yield from (use(one, each) for each in _of_self(other) if held_by(one))
        if not isinstance(node, ast.Call):
            return
        given = [*node.args, *(each.value for each in node.keywords)]
        args = [each for each in given if held_by(each)]
        yield from (use(one, each) for one in args for other in given for each in _of_self(other) if other is not one)
        if (called := self._called(node.func)) is None:
            if _of_self(node.func) and not isinstance(node.func, ast.Call):
                yield from (use(each, node.func) for each in args)
        elif self._depth < _DEEP:
            names = called.__code__.co_varnames[:called.__code__.co_argcount]
            put = dict(zip(names[isinstance(node.func, ast.Attribute):], node.args, strict=False))
            put |= {each.arg: each.value for each in node.keywords if each.arg}
            for inner in uses_in(called, self._kind, self._depth + 1):
                whole = inlined(inner.tensor, inner.steps, 0)
                if held_by(whole) <= put.keys() and held_by(tensor := substituted(whole, put)):
                    yield use(tensor, inner.by, inner)

    def _called(self, func: ast.expr) -> FunctionType | None:
        """The function that is called, of the same file, or of the same object."""
        found: Any = None
        if isinstance(func, ast.Name):
            found = self._function.__globals__.get(func.id)
            found = found if getattr(found, "__globals__", None) is self._function.__globals__ else None
        elif isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self":
            found = inspect.getattr_static(self._kind, func.attr, None) if self._kind is not None else None
        return found if isinstance(found, FunctionType) and not is_torchs(found) else None


def _position(node: ast.AST, indent: int) -> Position | None:
    return (node.lineno, node.end_lineno, node.col_offset + indent, (node.end_col_offset or 0) + indent) \
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


def _of_self(node: ast.expr) -> list[ast.expr]:
    """What `self` holds that an expression reads: `self.scale`, `self.heads[1]`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return [node]
    if isinstance(node, ast.Attribute | ast.Subscript) and (inner := _of_self(node.value)):
        return [node] if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) else inner
    if isinstance(node, ast.BinOp):
        return [*_of_self(node.left), *_of_self(node.right)]
    return _of_self(node.func.value) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []


def _tensors(node: ast.AST) -> Sequence[ast.expr]:
    """The tensors of which something is made that may mean their channels."""
    if isinstance(node, ast.Subscript):
        return [node.value] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.BinOp):
        sized = _sized(_size_in(node))
        return [] if sized is None else [sized]
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return []
    if node.func.attr == "einsum":
        return node.args[1:]
    holder = node.args[:1] if _is_torch(node.func.value) else [node.func.value]
    return holder if node.func.attr in _CALLED else []


def _is_torch(node: ast.expr) -> bool:
    return ast.unparse(node) in ("torch", "F", "nn.functional", "torch.nn.functional")


def _size_in(node: ast.BinOp) -> ast.expr:
    """What may be a size that something is divided by, or that has a power taken of it."""
    return node.left if isinstance(node.op, ast.Pow) else node.right if isinstance(node.op, ast.Div) else node


def _sized(node: ast.expr) -> ast.expr | None:
    """The tensor whose size along a dimension this is: x.shape[1], x.size(1)."""
    whole = node.value if isinstance(node, ast.Subscript) else node.func if isinstance(node, ast.Call) else None
    return whole.value if isinstance(whole, ast.Attribute) and whole.attr in ("shape", "size") else None


def _is_size(node: ast.expr) -> bool:
    return _sized(node) is not None


def may_mean(use: Use, x: Tensor, dims: Iterable[int] | None = None) -> bool:
    """Whether what is made of x may mean channels along one of its dimensions."""
    return any(x.shape[dim] > 1 and means(use, {dim: torch.arange(x.shape[dim]) == x.shape[dim] // 2}, x.dim())
               for dim in (range(x.dim()) if dims is None else dims))


def means(use: Use, dims: Dims, count: int) -> bool:
    """Whether what is made of a tensor of `count` dimensions depends on how many channels there are, or which; or on
    what `use.by` is."""
    use = use.innermost
    node = use.node
    if use.by is not None:
        return True
    if isinstance(node, ast.Subscript):
        return _cuts(node.slice, dims, count, use.parts)
    if isinstance(node, ast.BinOp):
        size: Any = _size_in(node)
        at = size.slice if isinstance(size, ast.Subscript) else size.args[0] if size.args else None
        return any(dim in dims for dim in _numbers(at, count))
    if node.func.attr == "einsum":
        return _contracts(node.args[0], node.args[1:].index(use.tensor), dims, count)
    args = node.args[1:] if _is_torch(node.func.value) else node.args
    name, words = node.func.attr, {each.arg: each.value for each in node.keywords}
    if name in _FIRST_OF_IMAGES:
        return 1 in dims
    if name in _ALONG or name in _DEFAULTS:
        place = _ALONG.get(name, 0)
        at = words.get("dim", words.get("dims", args[place] if len(args) > place else None))
        if at is None and name in _DEFAULTS:
            at = ast.Constant(_DEFAULTS[name])
        return any(dim in dims for dim in _numbers(at, count)) or (at is None and name in _OF_ALL)
    if name in ("chunk", "split"):
        at = words.get("dim", args[1] if len(args) > 1 else ast.Constant(0))
        return any(_unequal(name, args[0] if args else None, dims[dim]) for dim in _numbers(at, count) if dim in dims)
    if name == "unflatten":
        sizes = args[1].elts if len(args) > 1 and isinstance(args[1], ast.Tuple | ast.List) else ()
        return any(_divides(sizes, dims[dim]) for dim in _numbers(args[0] if args else None, count) if dim in dims)
    sizes = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple | ast.List) else args
    return not any(isinstance(size, ast.Starred) for size in sizes) and any(
        _divides(sizes[dim:], at) for dim, at in dims.items())


def _contracts(equation: ast.AST, operand: int, dims: Dims, count: int) -> bool:
    """Whether a sum of products, as einsum's first argument has it, is over channels of one of its factors."""
    read, _, made = str(getattr(equation, "value", "")).replace(" ", "").partition("->")
    letters = read.split(",")[operand] if operand < len(read.split(",")) else ""
    before, dots, behind = letters.partition("...")
    named = dict(enumerate(before)) | {count - len(behind) + at: each for at, each in enumerate(behind) if dots}
    return any(named[dim] not in made for dim in dims if dim in named)


def _numbers(node: ast.AST | None, count: int) -> list[int]:
    """Dimensions, counted from the first; none where the code computes them."""
    with suppress(Exception):
        value = ast.literal_eval(node)  # type: ignore[arg-type]
        return [each % count for each in (value if isinstance(value, tuple | list) else [value])]
    return []


def _cuts(index: ast.AST, dims: Dims, count: int, names: frozenset[str]) -> bool:
    """Whether an index takes some of the channels, by their place."""
    parts = list(index.elts) if isinstance(index, ast.Tuple) else [index]
    full = [number for number, each in enumerate(parts) if isinstance(each, ast.Constant) and each.value is ...]
    if full:
        missing = count - sum(not (isinstance(each, ast.Constant) and each.value in (None, ...)) for each in parts)
        parts[full[0]:full[0] + 1] = [ast.Slice()] * missing
    dim = 0
    for each in parts:
        if isinstance(each, ast.Constant) and each.value is None:
            continue
        ends = [each.lower, each.upper, each.step] if isinstance(each, ast.Slice) else [each]
        if dim in dims and any(end is not None and _stands(end, names) for end in ends):
            return True
        dim += 1
    return False


def _stands(node: ast.AST, names: frozenset[str] = frozenset()) -> bool:
    """Whether an end is a number that stands in the code, but 0, or that something holds, or a part of a size."""
    if isinstance(node, ast.UnaryOp):
        return _stands(node.operand, names)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.FloorDiv) and _is_size(node.left)
    return node.id in names if isinstance(node, ast.Name) else isinstance(node, ast.Attribute) or \
        (isinstance(node, ast.Constant) and type(node.value) is int and node.value != 0)


def _unequal(name: str, size: ast.AST | None, at: Tensor) -> bool:
    """Whether parts have other shares of the channels of a unit: not so where there are as many of each in all."""
    if not isinstance(size, ast.Constant) or type(size.value) is not int:
        return isinstance(size, ast.Tuple | ast.List) and any(map(_stands, size.elts))
    if name == "split":
        return True
    return size.value > 1 and not _alike(at, size.value)


def _divides(sizes: Sequence[ast.AST], at: Tensor) -> bool:
    """Whether a view has a number that stands in the code for one of the dimensions that channels are divided over."""
    for number, size in enumerate(sizes):
        literal = size.value if isinstance(size, ast.Constant) and type(size.value) is int else 0
        if literal == len(at) or not literal:
            behind = sizes[number + 1:number + 2] if isinstance(size, ast.UnaryOp | ast.BinOp) else ()
            return any(isinstance(each, ast.Constant) and type(each.value) is int and each.value > 1 and (
                len(at) % each.value > 0 or not _alike(at, len(at) // each.value)) for each in behind)
        if not _alike(at, literal):
            return True
        at = at.view(literal, -1)[0]
    return False


def _alike(at: Tensor, parts: int) -> bool:
    """Whether each of so many parts has the same places of a unit."""
    if parts < 1 or len(at) % parts:
        return False
    each = at.view(parts, -1)
    return bool((each == each[0]).all())
