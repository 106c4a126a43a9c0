"""What code says of a variable that would mean its channels, if it held them there: how many there are, or which."""

import ast
import dis
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# that run along a dimension, or several: of fewer channels they make something else -> where it is said, if not first
_ALONG = dict.fromkeys(("flip", "softmax", "log_softmax", "softmin", "logsumexp", "mean", "std", "var", "amax", "amin",
                        "median", "sort", "argsort", "cumprod", "cumsum", "sum", "prod", "max", "min", "argmax",
                        "argmin"), 0) | {"roll": 1, "topk": 1, "norm": 1, "normalize": 1}
_PARTS = {"chunk", "split", "unflatten", "view", "reshape"}
_OF_THEIR_OWN = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)  # code objects
Dims = Mapping[int, Tensor]  # dimension along which channels lie -> where those of a unit do, bool [size]
Position = tuple[int | None, int | None, int | None, int | None]  # of an instruction: lines, and columns


@dataclass(frozen=True)
class Use:
    """What a function makes of a variable. position: of it in the file. name: of the variable. lines: that come before,
    each condition that it depends on, outwards in: the last of them that runs is where the variable is looked up.
    parts: variables that hold a part of a size.
    """

    node: Any
    position: Position
    name: str
    lines: tuple[int, ...]
    parts: frozenset[str]


@lru_cache(maxsize=10000)
def uses_in(function: FunctionType) -> tuple[Use, ...]:
    """What a function does with variables that would mean their channels, if they held them there."""
    code = function.__code__
    if not {*_ALONG, *_PARTS, "shape", "size"}.intersection(code.co_names) and \
            not any("SLICE" in each.opname for each in dis.get_instructions(code)):
        return ()
    try:
        lines, first = inspect.getsourcelines(function)
        indent = len(lines[0]) - len(lines[0].lstrip())
        tree = ast.parse("".join(line[indent:] if line.strip() else "\n" for line in lines))
    except (OSError, TypeError, SyntaxError):  # of which nothing says what it does
        return ()
    offset, found = max(first, 1) - 1, list[Use]()

    parts = frozenset(
        target.id for each in ast.walk(tree) if isinstance(each, ast.Assign) and isinstance(each.value, ast.BinOp)
        and isinstance(each.value.op, ast.FloorDiv) and _sized(each.value.left) for target in each.targets
        if isinstance(target, ast.Name))

    def visit(node: Any, lines: tuple[int, ...]) -> None:
        if isinstance(node, _OF_THEIR_OWN):
            for each in getattr(node, "generators", ())[:1]:  # whose source is no part of it
                visit(each.iter, lines)
            return
        if (name := _variable(node)) is not None:
            position = (node.lineno + offset, node.end_lineno + offset, node.col_offset + indent,
                        node.end_col_offset + indent)
            found.append(Use(node, position, name, tuple(line + offset for line in lines), parts))
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                visit_all(value, (*lines, node.test.lineno) if isinstance(node, ast.If | ast.While) else lines)
            elif isinstance(value, list):
                for each in value:
                    visit(each, lines) if isinstance(each, ast.AST) else None
            elif isinstance(value, ast.AST):
                visit(value, lines)

    def visit_all(statements: Sequence[ast.stmt], lines: tuple[int, ...]) -> None:
        for statement in statements:
            visit(statement, (*lines, statement.lineno))
            if isinstance(statement, ast.If):  # which may return
                lines = (*lines, statement.lineno)

    body = tree.body[0]
    visit_all(body.body if isinstance(body, ast.FunctionDef) else (), ())
    return tuple(found)


def _variable(node: ast.AST) -> str | None:
    """Of what variable something is made that may mean its channels."""
    if isinstance(node, ast.Subscript):
        return node.value.id if isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load) else None
    if isinstance(node, ast.BinOp):
        return _sized(_size_in(node))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or \
            node.func.attr not in {*_ALONG, *_PARTS}:
        return None
    holder = node.func.value
    if isinstance(holder, ast.Name) and holder.id in ("torch", "F"):
        holder = node.args[0] if node.args else holder
    return holder.id if isinstance(holder, ast.Name) else None


def _size_in(node: ast.BinOp) -> ast.expr:
    """What may be a size that something is divided by, or that has a power taken of it."""
    return node.left if isinstance(node.op, ast.Pow) else node.right if isinstance(node.op, ast.Div) else node


def _sized(node: ast.expr) -> str | None:
    """The variable whose size along a dimension this is: x.shape[1], x.size(1)."""
    whole = node.value if isinstance(node, ast.Subscript) else node.func if isinstance(node, ast.Call) else None
    return whole.value.id if isinstance(whole, ast.Attribute) and whole.attr in ("shape", "size") and isinstance(
        whole.value, ast.Name) else None


def may_mean(use: Use, x: Tensor, dims: Iterable[int] | None = None) -> bool:
    """Whether what is made of a variable that holds x may mean channels along one of its dimensions."""
    return any(x.shape[dim] > 1 and means(use, {dim: torch.arange(x.shape[dim]) == x.shape[dim] // 2}, x.dim())
               for dim in (range(x.dim()) if dims is None else dims))


def means(use: Use, dims: Dims, count: int) -> bool:
    """Whether what is made of a variable of `count` dimensions depends on how many channels there are, or which."""
    node = use.node
    if isinstance(node, ast.Subscript):
        return _cuts(node.slice, dims, count, use.parts)
    if isinstance(node, ast.BinOp):
        size: Any = _size_in(node)
        at = size.slice if isinstance(size, ast.Subscript) else size.args[0] if size.args else None
        return any(dim in dims for dim in _numbers(at, count))
    of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "F")
    args = node.args[1:] if of_torch else node.args
    name, words = node.func.attr, {each.arg: each.value for each in node.keywords}
    if name in _ALONG:
        at = words.get("dim", words.get("dims", args[_ALONG[name]] if len(args) > _ALONG[name] else None))
        return any(dim in dims for dim in _numbers(at, count))
    if name in ("chunk", "split"):
        at = words.get("dim", args[1] if len(args) > 1 else ast.Constant(0))
        return any(_unequal(name, args[0] if args else None, dims[dim]) for dim in _numbers(at, count) if dim in dims)
    if name == "unflatten":
        sizes = args[1].elts if len(args) > 1 and isinstance(args[1], ast.Tuple | ast.List) else ()
        return any(_divides(sizes, dims[dim]) for dim in _numbers(args[0] if args else None, count) if dim in dims)
    sizes = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple | ast.List) else args
    return not any(isinstance(size, ast.Starred) for size in sizes) and any(
        _divides(sizes[dim:], at) for dim, at in dims.items())


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
    """Whether an end is a number that stands in the code, but 0, or a part of a size."""
    if isinstance(node, ast.UnaryOp):
        return _stands(node.operand, names)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.FloorDiv) and _sized(node.left) is not None
    return node.id in names if isinstance(node, ast.Name) else \
        isinstance(node, ast.Constant) and type(node.value) is int and node.value != 0


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
