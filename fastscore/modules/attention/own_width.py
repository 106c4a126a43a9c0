"""Attention modules whose code takes the width of what they read (`B, N, C = x.shape`, x.size(-1)) for that of what
their heads make, which is another one once heads, or channels of the stream, are gone.

Such a module gets a class of its own: the same code, but for C where it is about heads, or after their products, which
is what its output projection reads; and where it leaves the scale of its products to PyTorch, that of the width that
its heads had.
"""

import ast
import inspect
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from fastscore.modules.attention.own_names import Spelled, is_own
from fastscore.modules.changed_source import code_of, with_code
from fastscore.modules.made_classes import Made, made_class
from fastscore.modules.reachable_code import content
from fastscore.modules.source import tree_of

_QUERIES, _OUTPUTS = ("qkv", "q", "to_q", "query", "q_proj"), ("proj", "o_proj", "out_proj", "to_out")
_THREE = ("qkv", "to_qkv")
# attribute -> what it counts; of the module or of a child
COUNTS = ("num_heads", "n_heads", "num_attention_heads", "num_attn_heads", "n_head", "nhead", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_kv")
_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")
_WIDTH, _SCALE, _SIZE = "attended_width", "attended_scale", "attended_size"
DENSE_WIDTH = "dense_head_dim"  # attribute of attentions whose heads have lost dimensions: the width that they had


class _OwnWidth(Made):
    """What the classes made here have besides the code of their modules: the attributes that it takes before its first
    product, and from there on; those that it divides by; and whether it asks for the width of what it reads."""

    _first_read: tuple[str, ...]
    _then_read: tuple[str, ...]
    _divisors: frozenset[str]
    _asks: bool

    @property
    def attended_width(self) -> int:
        """Of what the heads make, and the output projection reads."""
        module: Any = self
        return _attended(module, self._then_read)

    def attended_size(self, x: Tensor, dim: int) -> int:
        """x.shape[dim]; of its last dimension, where that is as wide as what the module reads, `attended_width`."""
        module: Any = self
        reader = _called(module, _QUERIES) or _called(module, self._first_read)
        own = dim % x.dim() == x.dim() - 1 and reader is not None and x.shape[dim] == reader.in_features
        return self.attended_width if own else x.shape[dim]

    @property
    def attended_scale(self) -> float | None:
        """Of the products of queries and keys; None for that of the width that heads have."""
        dense = vars(self).get(DENSE_WIDTH)
        return None if dense is None else dense ** -0.5


def output_projection(module: nn.Module) -> nn.Linear | None:
    """The layer that reads what the heads of an attention module make; None where it has none of a usual name."""
    found = (getattr(module, name, None) for name in _OUTPUTS)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)


def _of_heads(module: nn.Module) -> int:
    """The width of all heads, of a module that keeps how many there are and how wide; 0 of any other."""
    count, width = (next((value for name in names if type(value := vars(module).get(name)) is int), 0)
                    for names in (COUNTS, HEAD_WIDTHS))
    return count * width


def _of_three(module: nn.Module) -> int:
    """The width of all heads, of a module that makes queries, keys and values in one layer; 0 of any other."""
    layer = _called(module, _THREE)
    return 0 if layer is None or layer.out_features % 3 else layer.out_features // 3


def _attended(module: nn.Module, after: Sequence[str]) -> int:
    """The width of what the heads of a module make, 0 where nothing says it. after: what its code takes from its first
    product on."""
    projection = output_projection(module)
    total = 0 if projection is not None else _of_heads(module)
    if projection is None and not total:
        projection = _called(module, after[::-1])
        total = _of_three(module)
    return projection.in_features if projection is not None else total


def _called(module: nn.Module, names: Iterable[str]) -> nn.Linear | None:
    """The first of these children that is a Linear."""
    return next((layer for name in names if isinstance(layer := module._modules.get(name), nn.Linear)), None)


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same of the width that the heads have; None for a module whose heads are, today, not
    as wide as what it reads, or whose code does not ask for the width of that."""
    linears = sum(isinstance(layer, nn.Linear) for layer in module._modules.values())
    if isinstance(module, _OwnWidth) or not linears or (linears == 1 and not _of_three(module)):
        return None
    kind: Any = type(module)
    made: Any = with_own_width(kind)
    if made is None:
        return None
    projection, reader = output_projection(module), _called(module, _QUERIES)
    if projection is None or reader is None or not any(name in vars(module) for name in COUNTS):
        reader = reader or _called(module, made._first_read)
        if not made._asks or not any(name in vars(module) for name in {*made._divisors, *COUNTS}):
            return None
    return made if reader is not None and reader.in_features == _attended(module, made._then_read) else None


def asks(cls: Any) -> bool:
    """Whether a class has such code, or another in its place already."""
    return issubclass(cls, _OwnWidth) or with_own_width(cls) is not None


@cache
def with_own_width(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class whose forward, and methods that this hands on what it reads to, read `attended_width` and
    `attended_scale`; None where their code asks for neither."""
    code, read = _rewritten(cls, "forward")
    codes = {"forward": code}
    for name in read.pop("hands_on", ()):  # what it reads, to a method of its own
        codes[name], of_method = _rewritten(cls, name)
        if codes[name] is not None:
            read |= {key: read[key] | of_method[key] for key in ("_divisors", "_asks")}
    functions = {name: _rewrapped(getattr(cls, name), code) for name, code in codes.items() if code is not None}
    return made_class(_OwnWidth, cls, with_own_width, **functions, **read) if functions else None


def _rewrapped(old: Any, code: CodeType) -> FunctionType:
    """The function with other code; of one with decorators, those around the one with other code."""
    inner = _decorated(old)
    if inner is None:
        return with_code(old, code, old.__closure__)
    made = _rewrapped(inner, code)
    around = with_code(old, old.__code__, tuple(CellType(made) if content(cell) is inner else cell
                                                for cell in old.__closure__))
    vars(around)["__wrapped__"] = made
    return around


def _decorated(function: Any) -> Any:
    """What a function that functools.wraps made calls; None where it is none, or has it in more places than one."""
    inner = vars(function).get("__wrapped__") if isinstance(function, FunctionType) else None
    held = [cell for cell in function.__closure__ or () if content(cell) is inner] if inner is not None else []
    return inner if len(held) == 1 else None


def _rewritten(cls: type[nn.Module], name: str) -> tuple[CodeType | None, dict[str, Any]]:
    """The code of a method, with the last dimension of its first tensor's shape replaced, None where it has none; and
    what else a class of _OwnWidth says of it, and the methods that it hands on what it reads to, where it can be read.

    One that refers to what stands around it stays as it is, and what stands around it by decorators does so.
    """
    forward = inspect.getattr_static(cls, name, None)
    decorated = _decorated(forward) is not None
    while (inner := _decorated(forward)) is not None:
        forward = inner
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return None, {}
    if (tree := tree_of(forward)) is None:
        return None, {}
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or (function.decorator_list and not decorated) \
            or len(function.args.args) < 2:
        return None, {}
    function.decorator_list = []
    x, owner = function.args.args[1].arg, function.args.args[0].arg
    Spelled(function, owner, cls, COUNTS).visit(function)
    divisors = _divisors(function, owner, x)
    hands_on = [node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call) and node.args
                and is_own(node.func, owner) and isinstance(node.args[0], ast.Name) and node.args[0].id == x]
    products = {*_PRODUCTS, *(node.attr for node in ast.walk(function) if is_own(node, owner)
                              and _has_products(inspect.getattr_static(cls, node.attr, None)))}
    layers = {node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call)
              and is_own(node.func, owner) and inspect.getattr_static(cls, node.func.attr, None) is None}
    widths = _Widths(owner, x, divisors, products, layers)
    product = min((_place(node) for node in ast.walk(function) if _multiplies(node, products)), default=(0, 0))
    names = sorted((_place(node), node.attr) for node in ast.walk(function) if is_own(node, owner))
    for number, statement in enumerate(function.body):
        if (width := _width_name(statement, x)) is not None:
            widths.names.add(width)
        else:
            function.body[number] = widths.visit(statement)
    unscaled = [call for call in ast.walk(function) if isinstance(call, ast.Call)
                and _PRODUCTS[0] in (getattr(call.func, "attr", ""), getattr(call.func, "id", ""))
                and all(keyword.arg not in (None, "scale") for keyword in call.keywords)]
    for call in unscaled:
        scale = ast.parse(f"{function.args.args[0].arg}.{_SCALE}", mode="eval").body
        call.keywords.append(ast.keyword("scale", scale))
    read = {"_first_read": tuple(name for place, name in names if place < product), "_divisors": divisors,
            "_then_read": tuple(name for place, name in names if place >= product), "_asks": widths.changed,
            "hands_on": hands_on}
    if not widths.changed and not unscaled:
        return None, read
    return code_of(tree, forward), read


def _divisors(function: ast.FunctionDef, owner: str, x: str) -> frozenset[str]:
    """The attributes of a module that its code divides the width of x by; of code that does not, and names no count of
    heads either, all that it divides by. One that divides rows alone, as the side of a window does, is none of them."""
    widths = {_width_name(node, x) for node in ast.walk(function) if isinstance(node, ast.stmt)}
    divisions = [(node.left, node.right.attr) for node in ast.walk(function) if isinstance(node, ast.BinOp)
                 and isinstance(node.op, ast.FloorDiv) and is_own(node.right, owner)]
    of_width = frozenset(name for left, name in divisions if any(
        _dim_asked(part, x) is not None or getattr(part, "id", "") in widths for part in ast.walk(left)))
    counted = any(is_own(node, owner) and node.attr in COUNTS for node in ast.walk(function))
    return of_width if of_width or counted else frozenset(name for _, name in divisions)


def _place(node: ast.AST) -> tuple[int, int]:
    """Where code ends, so that what runs within something else comes first."""
    return getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0)


class _Widths(ast.NodeTransformer):
    """Has code read the width of the heads where it reads `names`: in statements about heads, and from the first
    product of activations to the output projection. Elsewhere it is that of what the module reads, as of an image.

    owner: what the code calls its module; x: what that reads. counts: its attributes that divide a width, beside those
    of usual names. products: names of functions, and of its methods, that multiply activations. layers: that it calls.
    """

    def __init__(self, owner: str, x: str, counts: Iterable[str], products: Collection[str], layers: set[str]) -> None:
        self.names: set[str] = set()
        self._counts, self._products, self._layers = {*COUNTS, *counts}, products, layers
        self.changed = False
        self._owner, self._x, self._multiplied, self._here = owner, x, False, False

    def visit(self, node: ast.AST) -> Any:
        """The node with that changed in it."""
        if not isinstance(node, ast.stmt) or hasattr(node, "body"):
            return super().visit(node)
        inner = list(ast.walk(node))
        self._multiplied |= any(_multiplies(part, self._products) for part in inner)
        self._here = self._multiplied or self._counts_heads(inner)
        changed = self.generic_visit(node)
        self._here = False
        self._multiplied &= not any(map(self._projects, inner))
        self.names -= {part.id for part in inner if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        return changed

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The width of the heads, or the name as it is."""
        if not (self._here and node.id in self.names and isinstance(node.ctx, ast.Load)):
            return node
        self.changed = True
        owner = ast.copy_location(ast.Name(self._owner, ast.Load()), node)
        return ast.copy_location(ast.Attribute(owner, _WIDTH, ast.Load()), node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """A dimension of the shape of what the module reads, or the node as it is."""
        return self._asked(node) or self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The same of its size. What a layer is called with may be about heads or not, whatever comes of it; and what
        is done with what the output projection makes is not."""
        if (asked := self._asked(node)) is not None:
            return asked
        here = self._here
        if not self._multiplied and is_own(node.func, self._owner) and node.func.attr in self._layers:
            self._here = self._counts_heads(ast.walk(node))
        node.func = self.visit(node.func)
        if self._multiplied and any(map(self._projects, ast.walk(node.func))):
            self._here = False
        node.args, node.keywords = ([self.visit(each) for each in held] for held in (node.args, node.keywords))
        self._here = here
        return node

    def _counts_heads(self, nodes: Iterable[ast.AST]) -> bool:
        """Whether some are about heads."""
        return any(isinstance(node, ast.Attribute) and node.attr in self._counts for node in nodes)

    def _projects(self, node: ast.AST) -> bool:
        """Whether it is a call of the output projection."""
        return isinstance(node, ast.Call) and is_own(node.func, self._owner) and node.func.attr in _OUTPUTS

    def _asked(self, node: ast.expr) -> ast.expr | None:
        dim = _dim_asked(node, self._x) if self._here else None
        if dim is None or not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return None
        self.changed = True
        return ast.copy_location(ast.Call(ast.Attribute(ast.Name(self._owner, ast.Load()), _SIZE, ast.Load()),
                                          [ast.Name(self._x, ast.Load()), dim], []), node)


def _is_shape(node: ast.AST, x: str) -> bool:
    """Whether it is x.shape, or x.size."""
    return isinstance(node, ast.Attribute) and node.attr in ("shape", "size") and isinstance(node.value, ast.Name) \
        and node.value.id == x


def _dim_asked(node: ast.AST, x: str) -> ast.expr | None:
    """The dimension in x.shape[dim] or x.size(dim) that may be the last; None of other code."""
    if isinstance(node, ast.Subscript):
        of, dims = node.value, [node.slice]
    elif isinstance(node, ast.Call) and not node.keywords:
        of, dims = node.func, node.args
    else:
        return None
    number = ast.unparse(dims[0]) if _is_shape(of, x) and len(dims) == 1 else ""
    return dims[0] if number == "-1" or (number.isdigit() and int(number) > 1) else None


def _has_products(method: Any) -> bool:
    """Whether the code of a method names products of activations."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return code is not None and not set(_PRODUCTS).isdisjoint(code.co_names)


def _multiplies(node: ast.AST, products: Collection[str]) -> bool:
    """Whether it is a product of activations, or of attention."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    function = node.func if isinstance(node, ast.Call) else None
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in products


def _width_name(statement: ast.stmt, x: str) -> str | None:
    """Of `..., name = x.shape` (or x.size()), of three or more names, the last, and the same of `..., name, heads =
    *x.shape, self.heads`; of `name = x.shape[-1]` (or x.size(-1)) that; None for all other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, value = statement.targets[0], statement.value
    if isinstance(value, (ast.Subscript, ast.Call)) and isinstance(target, ast.Name):
        dim = _dim_asked(value, x)
        return target.id if dim is not None and ast.unparse(dim) == "-1" else None
    names = target.elts if isinstance(target, ast.Tuple) else []
    if isinstance(value, ast.Tuple) and value.elts and isinstance(value.elts[0], ast.Starred):
        names = names[:len(names) + 1 - len(value.elts)]
        value = value.elts[0].value
    if isinstance(value, ast.Call) and not value.args:
        value = value.func
    if not _is_shape(value, x) or len(names) < 3:
        return None
    last = names[-1]
    return last.id if isinstance(last, ast.Name) and last.id != "_" else None
