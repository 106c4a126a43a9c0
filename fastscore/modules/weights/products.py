"""Calls of PyTorch's functions that multiply by a weight, `F.linear(x, w)`, `x @ w`, an einsum, read as the product of
a Linear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RIGHT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
_ADDED = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
_SCALED = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
_DIVIDED = (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, torch.divide)
_VIEWS = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__, Tensor.transpose, torch.transpose,  # type: ignore[attr-defined]
          Tensor.permute, torch.permute, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims,
          Tensor.__getitem__, torch.select, Tensor.select, Tensor.unbind, torch.unbind, Tensor.__iter__, Tensor.squeeze,
          torch.squeeze}
PRODUCTS = {F.linear, torch.einsum, *_RIGHT, Tensor.__rmatmul__, *_ADDED}


@dataclass(frozen=True)
class Product:
    """A call that multiplies by a weight.

    weight: what the call is given as one. order: its dimensions in the order (copies, if there are several,) outputs,
    inputs. x: [(copies,) ..., inputs], what it is multiplied by. finish: makes of [(copies,) ..., outputs] what the
    call returns.
    """

    weight: Tensor
    order: tuple[int, ...]
    x: Tensor
    finish: Callable[[Tensor], Any]


def product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
            ) -> Product | None:
    """What a call multiplies by one weight; None of any other call. is_weight: whether a tensor is one."""
    if kwargs.get("out") is not None:
        return None
    if func is F.linear:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        if not is_weight(weight) or is_weight(x) or weight.dim() != 2:
            return None
        return Product(weight, (0, 1), x, lambda y: y if bias is None else y + bias)
    if func is torch.einsum:
        return _einsum(args, is_weight) if not kwargs else None
    if func in _RIGHT or func is Tensor.__rmatmul__:
        one, other = (*args, *kwargs.values())
        return _matrices(other, one, is_weight) if func is Tensor.__rmatmul__ else _matrices(one, other, is_weight)
    if func in _ADDED and set(kwargs) <= {"beta", "alpha"} and set(kwargs.values()) <= {1} and len(args) == 3:
        found = None if is_weight(args[0]) else _matrices(args[1], args[2], is_weight)
        return found and Product(found.weight, found.order, found.x, lambda y: args[0] + found.finish(y))
    return None


def scaled(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
           ) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """(a weight, what does to a tensor what a call does to the weight: multiply it by one number); None of others."""
    if kwargs or len(args) != 2 or not any(func is each for each in (*_SCALED, *_DIVIDED)):
        return None
    weight, other = args if is_weight(args[0]) else reversed(args)
    one = isinstance(other, (int, float)) or (isinstance(other, Tensor) and other.numel() == 1 and not is_weight(other))
    if not is_weight(weight) or not one or (func in _DIVIDED and weight is not args[0]):
        return None
    factor = other.reshape(()) if isinstance(other, Tensor) else other
    return weight, lambda y: y / factor if func in _DIVIDED else y * factor


def is_view(func: Any) -> bool:
    """Whether a function of a weight only shows it otherwise: turned, or one of its copies."""
    return func in _VIEWS


def _matrices(left: Any, right: Any, is_weight: Callable[[Any], bool]) -> Product | None:
    """The product of matrices, or of as many of them as a weight has."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or is_weight(left) == is_weight(right):
        return None
    weight, x = (left, right) if is_weight(left) else (right, left)
    batch = tuple(range(weight.dim() - 2))
    rows, columns = len(batch), len(batch) + 1
    if len(batch) > 1 or (batch and x.dim() not in (2, 3)):
        return None
    if batch:
        x = x.expand(len(weight), *x.shape[-2:])
    if weight is right:
        return Product(weight, (*batch, columns, rows), x, lambda y: y)
    if x.dim() == 1:
        return Product(weight, (rows, columns), x, lambda y: y)
    return Product(weight, (*batch, rows, columns), x.transpose(-1, -2), lambda y: y.transpose(-1, -2))


def _einsum(args: tuple[Any, ...], is_weight: Callable[[Any], bool]) -> Product | None:
    """That of an einsum of which one tensor is a weight, which has a letter that is summed over with one other alone,
    and one of its own. What else there is multiplies what comes of these two."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) < 2 or \
            sum(map(is_weight, operands)) != 1:
        return None
    sides, output = equation.replace(" ", "").split("->")
    of_each = sides.split(",")
    at = next(i for i, operand in enumerate(operands) if is_weight(operand))
    weight, of_weight = operands.pop(at), of_each.pop(at)
    if "." in of_weight or len(set(of_weight)) < len(of_weight):
        return None
    for i, of_x in enumerate(of_each):
        letters, others = of_x.replace("...", ""), "".join((output, *of_each[:i], *of_each[i + 1:]))
        summed = [letter for letter in letters if letter in of_weight and letter not in others]
        made = [letter for letter in of_weight if letter in others and letter not in letters]
        if len(set(letters)) == len(letters) and summed and made:
            return _pair(weight, of_weight, operands[i], of_x, (summed[-1], made[-1]),
                         [*zip(of_each[:i], operands[:i], strict=True), *zip(of_each[i + 1:], operands[i + 1:],
                                                                             strict=True)], output)
    return None


def _pair(weight: Tensor, of_weight: str, x: Tensor, of_x: str, sides: tuple[str, str],
          others: list[tuple[str, Tensor]], output: str) -> Product | None:
    """That of a weight and what it is multiplied by in an einsum. sides: the letters of its inputs and outputs. others:
    letters -> what multiplies that."""
    inputs, outputs = sides
    copies = "".join(letter for letter in of_weight if letter not in sides)
    if len(copies) > 1 or any(letter not in of_x and not any(letter in of_other for of_other in (
            output, *(each for each, _ in others))) for letter in copies):
        return None
    shared = copies and copies in of_x
    rest = of_x.replace(inputs, "").replace(copies, "") if copies else of_x.replace(inputs, "")
    x = torch.einsum(f"{of_x}->{copies if shared else ''}{rest}{inputs}", x)
    if copies and not shared:
        x = x.expand(weight.shape[of_weight.index(copies)], *x.shape)
    order = tuple(map(of_weight.index, (*copies, outputs, inputs)))
    terms = ",".join((f"{copies}{rest}{outputs}", *(each for each, _ in others)))
    return Product(weight, order, x, lambda y: torch.einsum(f"{terms}->{output}", y, *(other for _, other in others)))
