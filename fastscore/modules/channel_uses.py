"""What code says of a variable that would mean its channels, if it held them there: how many there are, or which."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from fastscore.modules.tensor_expressions import Step, inlined

# that run along a dimension, or several: of fewer channels they make something else -> where it is said, if not first
_ALONG = dict.fromkeys(("flip", "softmax", "log_softmax", "softmin", "logsumexp", "mean", "std", "var", "amax", "amin",
                        "median", "sort", "argsort", "cumprod", "cumsum", "cummax", "cummin", "sum", "prod", "max",
                        "min", "argmax", "argmin", "unbind", "narrow", "select", "index_select", "diff"), 0) | {
    "roll": 1, "topk": 1, "norm": 1, "normalize": 1, "vector_norm": 1, "quantile": 1, "glu": 0, "cat": 0, "concat": 0}
_OF_ALL = {"mean", "std", "var", "median", "norm", "vector_norm", "quantile", "amax", "amin", "sum", "prod", "max",
           "min"}  # along all dimensions, if none is said
_STATISTICS = {*_OF_ALL, "logsumexp"}
_DEFAULTS = {"normalize": 1, "glu": -1, "cat": 0, "concat": 0, "unbind": 0}  # where they run along one, if none is said
_FIRST_OF_IMAGES = {"group_norm", "pixel_shuffle", "channel_shuffle", "local_response_norm"}  # take the second for it
_PARTS = {"chunk", "split", "tensor_split", "unflatten", "view", "reshape", "layer_norm"}
_CALLED = {*_ALONG, *_DEFAULTS, *_FIRST_OF_IMAGES, *_PARTS}
_OF_SEVERAL = {"cat", "concat"}  # tensors, the first argument
Dims = Mapping[int, Tensor]  # dimension along which channels lie -> where those of a unit do, bool [size]
Position = tuple[int, int | None, int, int]  # of an instruction: lines, and columns


@dataclass(frozen=True, eq=False)
class Use:
    """What a function makes of a tensor. position: of it in the file. tensor: an expression of what variables hold,
    where it stands. lines: that come before, each condition that it depends on, outwards in: the last of them that runs
    is where the variables are looked up. steps: assignments that come before. parts: variables that hold a part of a
    size, or count. asked: conditions that constructors chose, and the answer that leads here. within: what is done with
    it, where a function that is called there does it. by: an expression of a module that is called on it, or of a
    tensor that a module or a variable holds and that meets it. alike: where another loop that is counted alike, as one
    over heads is, indexes it alike.
    """

    node: Any
    position: Position
    tensor: ast.expr
    lines: tuple[int, ...]
    steps: tuple[Step, ...]
    parts: frozenset[str]
    function: FunctionType
    asked: tuple[tuple[ast.expr, bool], ...] = ()
    by: ast.expr | None = None
    within: "Use | None" = None
    alike: tuple[Position, ...] = ()

    @property
    def innermost(self) -> "Use":
        """Itself, or what a function that is called there does."""
        return self if self.within is None else self.within.innermost

    @property
    def is_before(self) -> bool:
        """Whether it comes before what stands at its position, which reads it."""
        return (self.node.lineno, self.node.col_offset) < (self.position[0], self.position[2])

    @cached_property
    def tensors(self) -> Mapping[int, ast.expr]:
        """Line -> the tensor as an expression of what variables hold before that line runs."""
        return {line: inlined(self.tensor, self.steps, line) for line in self.lines}

    def met(self, line: int) -> ast.expr | None:
        """What meets the tensor, as an expression of what variables hold before that line runs."""
        return None if self.by is None else inlined(self.by, self.steps, line)


def tensors_in(node: ast.AST, around: Mapping[str, Any]) -> Sequence[ast.expr]:
    """The tensors of which something is made that may mean their channels. around: a file's names."""
    if isinstance(node, ast.Subscript):
        return [node.value] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.BinOp):
        sized = _sized(_size_in(node))
        return [] if sized is None else [sized]
    if not isinstance(node, ast.Call):
        return []
    name, args = _call(node, around)
    if name == "einsum":
        return args[1:]
    if name in _OF_SEVERAL:
        return args[0].elts if args and isinstance(args[0], ast.Tuple | ast.List) else []
    return args[:1] if name in _CALLED else []


def is_statistic(node: ast.AST, around: Mapping[str, Any]) -> bool:
    """Whether this computes numbers over what lies along a dimension, or along all."""
    return isinstance(node, ast.Call) and _call(node, around)[0] in _STATISTICS


def _call(node: ast.Call, around: Mapping[str, Any]) -> tuple[str, list[ast.expr]]:
    """What is called of PyTorch, or of a tensor, and on what, the tensor first."""
    tensor = [each.value for each in node.keywords if each.arg in ("input", "tensors")]
    if isinstance(node.func, ast.Name):
        found = around.get(node.func.id)
        of_torch = callable(found) and str(getattr(found, "__module__", "")).partition(".")[0] == "torch"
        return (str(getattr(found, "__name__", "")) if of_torch else ""), [*tensor, *node.args]
    if not isinstance(node.func, ast.Attribute):
        return "", []
    return node.func.attr, [*tensor, *node.args] if is_torch(node.func.value, around) else [node.func.value, *node.args]


def is_torch(node: ast.expr, around: Mapping[str, Any]) -> bool:
    """Whether a file means PyTorch by this, or a part of it: `torch.linalg`, `F`."""
    if isinstance(node, ast.Attribute):
        return is_torch(node.value, around)
    found = around.get(node.id) if isinstance(node, ast.Name) else None
    return isinstance(found, ModuleType) and found.__name__.partition(".")[0] == "torch"


def _size_in(node: ast.BinOp) -> ast.expr:
    """What may be a size that something is divided by, or that has a power taken of it."""
    whole = node.left if isinstance(node.op, ast.Pow) else node.right if isinstance(node.op, ast.Div) else node
    return whole if whole is node else next(filter(is_size, ast.walk(whole)), whole)  # type: ignore[arg-type]


def _sized(node: ast.expr) -> ast.expr | None:
    """The tensor whose size along a dimension this is: x.shape[1], x.size(1)."""
    whole = node.value if isinstance(node, ast.Subscript) else node.func if isinstance(node, ast.Call) else None
    return whole.value if isinstance(whole, ast.Attribute) and whole.attr in ("shape", "size") else None


def is_size(node: ast.expr) -> bool:
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
    name, args = _call(node, use.function.__globals__)
    if name == "einsum":
        return _contracts(args[0], args[1:].index(use.tensor), dims, count)
    args, words = args[1:], {each.arg: each.value for each in node.keywords}
    if name in _FIRST_OF_IMAGES:
        return 1 in dims
    if name in _ALONG:
        place = _ALONG[name]
        at = words.get("dim", words.get("dims", words.get("axis", args[place] if len(args) > place else None)))
        if name == "flip" and len(args) > 1:
            at = ast.Tuple(args, ast.Load())
        if at is None and name in _DEFAULTS:
            at = ast.Constant(_DEFAULTS[name])
        return any(dim in dims for dim in _numbers(at, count)) or (at is None and name in _OF_ALL)
    if name in ("chunk", "split", "tensor_split"):
        at = words.get("dim", args[1] if len(args) > 1 else ast.Constant(0))
        return any(_unequal(name, args[0] if args else None, dims[dim]) for dim in _numbers(at, count) if dim in dims)
    if name == "unflatten":
        sizes = args[1].elts if len(args) > 1 and isinstance(args[1], ast.Tuple | ast.List) else ()
        return any(_divides(sizes, dims[dim]) for dim in _numbers(args[0] if args else None, count) if dim in dims)
    if name == "layer_norm":
        over = _said(words.get("normalized_shape", args[0] if args else ast.Constant(1)), count)
        return over is not None and any(dim >= count - over for dim in dims)
    sizes = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple | ast.List) else args
    sizes = list(_one_by_one(sizes, count))
    return any(_divides(sizes[dim:], at) for dim, at in dims.items())


def _said(sizes: ast.expr, count: int) -> int | None:
    """How many sizes are said by `(3, 4)` or `x.shape[1:]`."""
    if isinstance(sizes, ast.Tuple | ast.List):
        return len(sizes.elts)
    whole = sizes.value if isinstance(sizes, ast.Subscript) else None
    if not isinstance(whole, ast.Attribute) or whole.attr != "shape":
        return 1
    return len(_numbers_of(sizes.slice, count)) if isinstance(sizes, ast.Subscript) else None


def _numbers_of(index: ast.expr, count: int) -> range:
    """Which of so many dimensions a slice takes; none where the code computes its ends."""
    if not isinstance(index, ast.Slice):
        return range(0)
    ends = [None if each is None else ast.literal_eval(each) for each in (index.lower, index.upper)]
    return range(count)[slice(*ends)]


def _one_by_one(sizes: Iterable[ast.expr], count: int) -> Iterable[ast.expr]:
    """Sizes of a view, `*x.shape[2:]` as so many that code computes; none after what is not known."""
    for size in sizes:
        if not isinstance(size, ast.Starred):
            yield size
            continue
        whole = size.value.value if isinstance(size.value, ast.Subscript) else None
        taken = range(0)
        if isinstance(whole, ast.Attribute) and whole.attr == "shape" and isinstance(size.value, ast.Subscript):
            with suppress(ValueError):
                taken = _numbers_of(size.value.slice, count)
        if not taken:
            return
        yield from (ast.Name("size", ast.Load()) for _ in taken)


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
        dims = list(value) if isinstance(value, tuple | list) else [value]
        return [each % count for each in dims] if all(-count <= each < count for each in dims) else []
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
        return isinstance(node.op, ast.FloorDiv) and is_size(node.left)
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
