"""Expressions of tensors, of which nothing comes but their values: from the variables that code has them in."""

import ast
import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from types import CodeType
from typing import Any, TypeAlias

import torch

Step: TypeAlias = tuple[int, str, ast.expr]  # an assignment: line, variable, what it is given

# methods, and functions of torch, that compute number by number, or over a dimension, or give the numbers another shape
_PURE = {"relu", "sigmoid", "tanh", "silu", "gelu", "exp", "log", "abs", "neg", "sqrt", "rsqrt", "square", "pow",
         "softplus", "leaky_relu", "elu", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach",
         "permute", "transpose", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "movedim", "size",
         "add", "sub", "mul", "div", "clamp", "dim", "t", "swapaxes", "type_as", "view_as", "chunk", "split", "unbind",
         "mean", "sum", "amax", "amin", "std", "var", "norm", "softmax", "flip", "roll", "expand", "repeat", "cat",
         "stack", "where", "masked_fill", "normalize", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "narrow"}
_MODULES = ("torch", "F")
_MOST = 200  # parts of an expression


def held_by(node: ast.expr) -> set[str]:
    """The variables that an expression of tensors is of; none where it is something else."""
    parts = list(ast.walk(node))
    if len(parts) > _MOST or isinstance(node, ast.Constant) or not all(map(_is_pure, parts)):
        return set()
    return {each.id for each in parts if isinstance(each, ast.Name)} - {*_MODULES, "self"}


def _is_pure(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        whole = node.func.value if isinstance(node.func, ast.Attribute) else None
        return isinstance(node.func, ast.Attribute) and node.func.attr in _PURE and not (
            isinstance(whole, ast.Name) and whole.id == "self")  # a layer: `self.norm(x)`
    if isinstance(node, ast.Attribute):
        return node.attr in _PURE | {"shape", "mT", "T", "dtype", "ndim"}
    return isinstance(node, ast.Name | ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop |
                      ast.Subscript | ast.Slice | ast.Tuple | ast.List | ast.expr_context | ast.keyword)


def inlined(node: ast.expr, steps: Sequence[Step], line: int) -> ast.expr:
    """An expression, of what variables hold before `line`, where these assignments come before it; that of None where
    one of them cannot be told. What a module makes of a variable is taken for as wide: `h = self.act(h)`."""
    for number, name, value in reversed(steps):
        if number < line or not any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node)):
            continue
        if held_by(value):
            node = substituted(node, {name: value})
        elif not isinstance(value, ast.Call) or [ast.unparse(each) for each in value.args] != [name]:
            return ast.Constant(None)
    return node


def substituted(node: ast.expr, values: Mapping[str, ast.expr]) -> ast.expr:
    """An expression with others in the place of variables."""
    class Put(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(values[node.id]) if node.id in values else node

    put: ast.expr = Put().visit(copy.deepcopy(node))
    return put


def value_of(node: ast.expr, names: Mapping[str, Any], around: dict[str, Any]) -> Any:
    """What an expression is, of variables, and of a file's; None where it cannot be computed. Of two things that meet
    number by number, one that can stands for both."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if any(isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and isinstance(each.func.value, ast.Name)
           and isinstance(names.get(each.func.value.id), torch.nn.Module) for each in ast.walk(node)):
        return None  # which would run a layer
    with suppress(Exception), torch._C.DisableTorchFunction(), torch.no_grad():
        return eval(_compiled(node), around, names)
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.MatMult):  # `x * mask`, where there is no mask
        sides = [value_of(each, names, around) for each in (node.left, node.right)]
        return next((side for side in sides if isinstance(side, torch.Tensor)), None)
    return None


@lru_cache(maxsize=10000)
def _compiled(node: ast.expr) -> CodeType:
    return compile(ast.fix_missing_locations(ast.Expression(node)), "<expression>", "eval")
