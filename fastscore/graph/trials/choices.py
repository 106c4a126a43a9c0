"""What a model's code chooses by what its layers make: noted in one run, and made otherwise in the next.

No gradient, and in most batches no change of value either, shows that rows are picked, merged or left out by what some
channels hold: the same rows may be picked without these channels. So where a choice depends on what was changed,
another one is put in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastscore.batches import tensors_of
from fastscore.graph.trials.differences import close

# operations that choose along a dimension of their first argument
_ALONG = {"argmax", "argmin", "topk", "sort", "argsort", "max.dim", "min.dim", "kthvalue", "mode", "multinomial"}
# operations that answer for each element, in another dtype, or for several at once
_ANSWERS = {"gt", "lt", "ge", "le", "eq", "ne", "logical_not", "logical_and", "logical_or", "isin", "_to_copy", "any",
            "all", "count_nonzero", "bucketize", "searchsorted"}
_STEPS = {"round", "floor", "ceil", "trunc", "sign", "heaviside"}  # functions without a gradient, element by element


class Choices(TorchDispatchMode):
    """Within the block, choices that the code makes are noted, or made otherwise.

    noted: what the choices of a run were made by; None: `self.noted` is to hold those of this run. Otherwise those
    choices come out otherwise whose operands are not what is noted. turn: another number, another outcome; None: they
    come out as they did.
    """

    supports_higher_order_operators = True

    def __init__(self, noted: list[tuple[str, list[Tensor]]] | None = None, turn: int | None = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = [] if noted is None else noted
        self._left = None if noted is None else iter(noted)
        self._paused, self._turn = False, turn

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the block, operations are none of the model's code."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        operands = [x for x in tensors_of((args, kwargs)) if x.is_floating_point()]
        if self._paused or name is None or not operands or _tells_numbers(operands, args):
            return func(*args, **kwargs)
        if self._left is None:
            self.noted.append((name, [x.clone() for x in operands]))
            return func(*args, **kwargs)
        known, before = next(self._left, (None, []))
        if known != name or [x.shape for x in before] != [x.shape for x in operands]:  # the code goes another way
            self._left = iter(())
            return func(*args, **kwargs)
        if self._turn is None:
            held = iter(before)
            args, kwargs = tree_map_only(Tensor, lambda x: next(held) if x.is_floating_point() else x, (args, kwargs))
            return func(*args, **kwargs)
        differs = torch.zeros((), dtype=torch.bool, device=operands[0].device)
        for x, old in zip(operands, before, strict=True):
            differs = differs | ~close(x, old)
        return _otherwise(func, name, args, kwargs, differs, self._turn)


def _name(func: Any) -> str | None:
    """The name of an operation that chooses; None of another."""
    if not isinstance(func, torch._ops.OpOverload):
        return None
    operation = func._schema.name.split("::")[-1]
    return next((name for name in (operation, f"{operation}.{func._overloadname}")
                 if name in _ALONG or name in _ANSWERS or name in _STEPS or name == "nonzero"), None)


def _tells_numbers(operands: list[Tensor], args: Any) -> bool:
    """Whether a comparison asks for NaN or infinity: x == x, x == inf."""
    other = args[1] if len(args) > 1 else None
    return (len(operands) == 2 and operands[0] is operands[1]) or (isinstance(other, float) and abs(other) == torch.inf)


def _otherwise(func: Any, name: str, args: Any, kwargs: Any, differs: Tensor, turn: int) -> Any:
    """What `func` returns, but otherwise where its operands differ."""
    if name in _ALONG:
        x, dim = args[0], _dim(func, args, kwargs)
        places = x.numel() if dim is None else x.shape[dim]
        by = 1 + turn % max(1, places - 1)
        whole = x.flatten().roll(by).view_as(x) if dim is None else x.roll(by, dim)
        changed = differs.any() if dim is None else differs.any(dim, keepdim=True)
        return func(torch.where(changed, whole, x), *args[1:], **kwargs)
    if name == "nonzero":
        return func(torch.where(differs, (args[0] == 0).to(args[0]), args[0]))
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor) or ((out.is_floating_point() or out.is_complex()) and name not in _STEPS):
        return out
    other = ~out if out.dtype == torch.bool else out + 1 if name in _STEPS else torch.where(out > 0, out - 1, out + 1)
    return torch.where(differs if out.shape == differs.shape else differs.any(), other, out)


def _dim(func: Any, args: Any, kwargs: Any) -> int | None:
    """The dimension along which an operation chooses; None for all at once."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            dim: int | None = args[place] if place < len(args) and not argument.kwarg_only else \
                kwargs.get("dim", argument.default_value)
            return dim
    return -1  # of multinomial
