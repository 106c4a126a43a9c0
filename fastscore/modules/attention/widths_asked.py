"""How the code of attention modules asks for the width of what they read, and what it multiplies: see
fastscore.modules.attention.own_width."""

import ast
from collections.abc import Collection
from typing import Any

PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")


def width_name(statement: ast.stmt, x: str, images: bool) -> str | None:
    """Of `..., name = x.shape` (or x.size()), of three or more names, the last, and the same of `..., name, heads =
    *x.shape, self.heads`; of `name = x.shape[-1]` (or x.size(-1)) that; of images the second, and `name = x.shape[1]`;
    None for all other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, value = statement.targets[0], statement.value
    if isinstance(value, (ast.Subscript, ast.Call)) and isinstance(target, ast.Name):
        dim = dim_asked(value, x, images)
        return target.id if dim is not None and ast.unparse(dim) == ("1" if images else "-1") else None
    names = target.elts if isinstance(target, ast.Tuple) else []
    if isinstance(value, ast.Tuple) and value.elts and isinstance(value.elts[0], ast.Starred):
        names = names[:len(names) + 1 - len(value.elts)]
        value = value.elts[0].value
    if isinstance(value, ast.Call) and not value.args:
        value = value.func
    if not _is_shape(value, x) or len(names) < 3:
        return None
    width = names[1 if images else -1]
    return width.id if isinstance(width, ast.Name) and width.id != "_" else None


def dim_asked(node: ast.AST, x: str, images: bool) -> ast.expr | None:
    """The dimension in x.shape[dim] or x.size(dim) that may be the last, or of images the second; None of other code.
    """
    if isinstance(node, ast.Subscript):
        of, dims = node.value, [node.slice]
    elif isinstance(node, ast.Call) and not node.keywords:
        of, dims = node.func, node.args
    else:
        return None
    number = ast.unparse(dims[0]) if _is_shape(of, x) and len(dims) == 1 else ""
    wide = number == "1" if images else number == "-1" or (number.isdigit() and int(number) > 1)
    return dims[0] if wide else None


def _is_shape(node: ast.AST, x: str) -> bool:
    """Whether it is x.shape, or x.size."""
    return isinstance(node, ast.Attribute) and node.attr in ("shape", "size") and isinstance(node.value, ast.Name) \
        and node.value.id == x


def has_products(method: Any) -> bool:
    """Whether the code of a method names products of activations."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return code is not None and not set(PRODUCTS).isdisjoint(code.co_names)


def multiplies(node: ast.AST, products: Collection[str]) -> bool:
    """Whether it is a product of activations, or of attention."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    function = node.func if isinstance(node, ast.Call) else None
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in products
