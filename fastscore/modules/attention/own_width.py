"""Attention modules whose code takes the width of what they read (`B, N, C = x.shape`, x.size(-1); of images, whose
layers are convolutions, `B, C, H, W = x.shape`, x.size(1)) for that of what their heads make, which is another one once
heads, or channels of the stream, are gone.

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
from fastscore.modules.attention.widths_asked import PRODUCTS, dim_asked, has_products, multiplies, width_name
from fastscore.modules.changed_source import code_of, with_code
from fastscore.modules.made_classes import Made, made_class
from fastscore.modules.reachable_code import content
from fastscore.modules.source import tree_of

_QUERIES, _OUTPUTS = ("qkv", "q", "to_q", "query", "q_proj"), ("proj", "o_proj", "out_proj", "to_out")
_THREE = ("qkv", "to_qkv")
_KINDS: tuple[type[nn.Module], ...] = nn.Linear, nn.modules.conv._ConvNd  # of layers, of tokens and of images
# attribute -> what it counts; of the module or of a child
COUNTS = ("num_heads", "n_heads", "num_attention_heads", "num_attn_heads", "n_head", "nhead", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_kv")
_WIDTH, _SCALE, _SIZE = "attended_width", "attended_scale", "attended_size"
DENSE_WIDTH = "dense_head_dim"  # attribute of attentions whose heads have lost dimensions: the width that they had


class _OwnWidth(Made):
    """What the classes made here have besides the code of their modules: the attributes that it takes before its first
    product, and from there on; those that it divides by; whether it asks for the width of what it reads; and whether
    that is of images."""

    _first_read: tuple[str, ...]
    _then_read: tuple[str, ...]
    _divisors: frozenset[str]
    _asks: bool
    _images: bool

    @property
    def attended_width(self) -> int:
        """Of what the heads make, and the output projection reads."""
        module: Any = self
        return _attended(module, self._then_read, self._images)

    def attended_size(self, x: Tensor, dim: int) -> int:
        """x.shape[dim]; of the dimension of its channels, where they are as many as the module reads, `attended_width`.
        """
        module: Any = self
        reader = _called(module, _QUERIES, self._images) or _called(module, self._first_read, self._images)
        own = dim % x.dim() == (1 if self._images else x.dim() - 1) and reader is not None and \
            x.shape[dim] == _inputs(reader)
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


def _of_three(module: nn.Module, images: bool) -> int:
    """The width of all heads, of a module that makes queries, keys and values in one layer; 0 of any other."""
    layer: Any = _called(module, _THREE, images)
    made = 0 if layer is None else layer.out_channels if images else layer.out_features
    return 0 if made % 3 else made // 3


def _attended(module: nn.Module, after: Sequence[str], images: bool) -> int:
    """The width of what the heads of a module make, 0 where nothing says it. after: what its code takes from its first
    product on."""
    projection = _called(module, _OUTPUTS, images)
    total = 0 if projection is not None else _of_heads(module)
    if projection is None and not total:
        projection = _called(module, after[::-1], images)
        total = _of_three(module, images)
    return _inputs(projection) if projection is not None else total


def _called(module: nn.Module, names: Iterable[str], images: bool) -> nn.Module | None:
    """The first of these children that is a Linear; of a module that reads images, a convolution."""
    return next((layer for name in names if isinstance(layer := module._modules.get(name), _KINDS[images])), None)


def _inputs(layer: Any) -> int:
    """How many channels a layer reads."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same of the width that the heads have; None for a module whose heads are, today, not
    as wide as what it reads, or whose code does not ask for the width of that."""
    return None if isinstance(module, _OwnWidth) else _replacement(module, False) or _replacement(module, True)


def _replacement(module: nn.Module, images: bool) -> type[nn.Module] | None:
    layers = sum(isinstance(layer, _KINDS[images]) for layer in module._modules.values())
    if images and any(isinstance(layer, nn.Linear) for layer in module._modules.values()):
        return None  # it reads tokens
    if not layers or (layers == 1 and not _of_three(module, images)):
        return None
    kind: Any = type(module)
    made: Any = with_own_width(kind, True) if images else with_own_width(kind)
    if made is None:
        return None
    projection, reader = _called(module, _OUTPUTS, images), _called(module, _QUERIES, images)
    if images or projection is None or reader is None or not any(name in vars(module) for name in COUNTS):
        reader = reader or _called(module, made._first_read, images)
        if not made._asks or not any(name in vars(module) for name in {*made._divisors, *COUNTS}):
            return None
    return made if reader is not None and _inputs(reader) == _attended(module, made._then_read, images) else None


def asks(module: nn.Module) -> bool:
    """Whether a module has such code, or another in its place already."""
    kind: Any = type(module)
    return isinstance(module, _OwnWidth) or with_own_width(kind) is not None or _replacement(module, True) is not None


@cache
def with_own_width(cls: type[nn.Module], images: bool = False) -> type[nn.Module] | None:
    """The class whose forward, and methods that this hands on what it reads to, read `attended_width` and
    `attended_scale`; None where their code asks for neither."""
    code, read = _rewritten(cls, "forward", images)
    codes = {"forward": code}
    for name in read.pop("hands_on", ()):  # what it reads, to a method of its own
        codes[name], of_method = _rewritten(cls, name, images)
        if codes[name] is not None:
            read |= {key: read[key] | of_method[key] for key in ("_divisors", "_asks")}
    functions = {name: _rewrapped(getattr(cls, name), code) for name, code in codes.items() if code is not None}
    return made_class(_OwnWidth, cls, with_own_width, *([True] if images else []), _images=images, **functions,
                      **read) if functions else None


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


def _rewritten(cls: type[nn.Module], name: str, images: bool) -> tuple[CodeType | None, dict[str, Any]]:
    """The code of a method, with the width in its first tensor's shape replaced, None where it has none; and
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
    divisors = _divisors(function, owner, x, images)
    hands_on = [node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call) and node.args
                and is_own(node.func, owner) and isinstance(node.args[0], ast.Name) and node.args[0].id == x]
    products = {*PRODUCTS, *(node.attr for node in ast.walk(function) if is_own(node, owner)
                              and has_products(inspect.getattr_static(cls, node.attr, None)))}
    layers = {node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call)
              and is_own(node.func, owner) and inspect.getattr_static(cls, node.func.attr, None) is None}
    widths = _Widths(owner, x, images, divisors, products, layers)
    product = min((_place(node) for node in ast.walk(function) if multiplies(node, products)), default=(0, 0))
    calls = {call.func: call for call in ast.walk(function) if isinstance(call, ast.Call)}
    names = sorted((_place(calls.get(node, node)), node.attr, _place(node) >= product or any(
        multiplies(part, products) and _place(part) == product for part in ast.walk(calls.get(node, node))))
        for node in ast.walk(function) if is_own(node, owner))  # of what is called, what it reads comes first
    body, function.body = function.body, []
    for statement in body:
        if (width := width_name(statement, x, images)) is None:
            function.body.append(widths.visit(statement))
            continue
        widths.names.add(width)
        function.body.append(statement)
        if images:  # which it may not be, of tokens that lie second
            of_heads = ast.parse(f"{_WIDTH}_{width} = {owner}.{_SIZE}({x}, 1)").body[0]
            function.body.append(ast.copy_location(of_heads, statement))
    unscaled = [call for call in ast.walk(function) if isinstance(call, ast.Call)
                and PRODUCTS[0] in (getattr(call.func, "attr", ""), getattr(call.func, "id", ""))
                and all(keyword.arg not in (None, "scale") for keyword in call.keywords)]
    for call in unscaled:
        scale = ast.parse(f"{function.args.args[0].arg}.{_SCALE}", mode="eval").body
        call.keywords.append(ast.keyword("scale", scale))
    read = {"_first_read": tuple(name for _, name, behind in names if not behind), "_divisors": divisors,
            "_then_read": tuple(name for _, name, behind in names if behind), "_asks": widths.changed,
            "hands_on": hands_on}
    if not widths.changed and not unscaled:
        return None, read
    return code_of(tree, forward), read


def _divisors(function: ast.FunctionDef, owner: str, x: str, images: bool) -> frozenset[str]:
    """The attributes of a module that its code divides the width of x by; of code that does not, and names no count of
    heads either, all that it divides by. One that divides rows alone, as the side of a window does, is none of them."""
    widths = {width_name(node, x, images) for node in ast.walk(function) if isinstance(node, ast.stmt)}
    divisions = [(node.left, node.right.attr) for node in ast.walk(function) if isinstance(node, ast.BinOp)
                 and isinstance(node.op, ast.FloorDiv) and is_own(node.right, owner)]
    of_width = frozenset(name for left, name in divisions if any(
        dim_asked(part, x, images) is not None or getattr(part, "id", "") in widths for part in ast.walk(left)))
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

    def __init__(self, owner: str, x: str, images: bool, counts: Iterable[str], products: Collection[str],
                 layers: set[str]) -> None:
        self.names: set[str] = set()
        self._counts, self._products, self._layers = {*COUNTS, *counts}, products, layers
        self.changed = False
        self._owner, self._x, self._images, self._multiplied, self._here = owner, x, images, False, False

    def visit(self, node: ast.AST) -> Any:
        """The node with that changed in it."""
        if not isinstance(node, ast.stmt) or hasattr(node, "body"):
            return super().visit(node)
        inner = list(ast.walk(node))
        self._multiplied |= any(multiplies(part, self._products) for part in inner)
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
        if self._images:
            return ast.copy_location(ast.Name(f"{_WIDTH}_{node.id}", ast.Load()), node)
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
        dim = dim_asked(node, self._x, self._images) if self._here else None
        if dim is None or not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return None
        self.changed = True
        return ast.copy_location(ast.Call(ast.Attribute(ast.Name(self._owner, ast.Load()), _SIZE, ast.Load()),
                                          [ast.Name(self._x, ast.Load()), dim], []), node)
