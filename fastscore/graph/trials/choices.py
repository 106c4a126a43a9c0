"""What a model's code chooses by what its layers make: noted in one run, and made otherwise in the next.

No gradient, and in most batches no change of value either, shows that rows are picked, merged or left out by what some
channels hold: the same rows may be picked without these channels. So where a choice depends on what was changed,
another one is put in its place; and in some turns another one in each row, as rows that all choose otherwise alike are
as equal to each other as they were.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from fastscore.batches.parts import tensors_of
from fastscore.graph.following.operations import ALIKE, ALONG, OperationsAndNumbers, name_of
from fastscore.graph.trials.differences import close

HELD = -1  # in place of a turn: everything is chosen as it was
TURNS = 8  # by which all choose otherwise, neighbours unlike each other, and all alike
# operations that answer for each element, in another dtype, or for several at once
_ANSWERS = {"gt", "lt", "ge", "le", "eq", "ne", "logical_not", "logical_and", "logical_or", "logical_xor", "isin",
            "_to_copy", "copy", "any", "all", "count_nonzero", "bucketize", "searchsorted", "signbit", "equal",
            "bernoulli"}
# those that look each element up among others, and where these stand in their arguments
_TABLES = {"bucketize": 1, "searchsorted": 0, "isin": 1}
# functions without a gradient, element by element
_STEPS = {"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside", "div.Tensor_mode", "div.Scalar_mode",
          "floor_divide", "histc"}
# maxima over windows of the last dimensions, so many, and where they lie
_POOLS = {"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "adaptive_max_pool2d": 2,
          "adaptive_max_pool3d": 3, "fractional_max_pool2d": 2, "fractional_max_pool3d": 3}
# functions that are flat on one side, or both: where all that they give is one number, other numbers may show
_FLAT = {"relu", "threshold", "clamp", "clamp_min", "clamp_max", "hardtanh", "hardsigmoid", "hardshrink", "softshrink",
         "maximum", "minimum", "fmax", "fmin"}
_SOME = 64  # numbers, which are looked at first
_NUMBERS = {"_local_scalar_dense"}  # of Python: what is made of them, nobody sees
_KNOWN = ALONG | ALIKE | _ANSWERS | _STEPS | _NUMBERS | _FLAT | {"nonzero", *_POOLS}

Noted: TypeAlias = list[tuple[str, list[Tensor] | None]]  # choice by choice; None: of one that nothing depends on


class Choices(OperationsAndNumbers):
    """Within the block, choices that the code makes are noted, or made otherwise.

    noted: what the choices of a run were made by; None: `self.noted` is to hold those of this run. Otherwise those
    choices come out otherwise whose operands are not what is noted. turn: another number, another outcome; None: they
    come out as they did. differ: whether there were any. read: whether the code has made Python numbers of what is not
    what is noted.
    """

    def __init__(self, noted: Noted | None = None, turn: int | None = 0) -> None:
        super().__init__()
        self.noted: Noted = [] if noted is None else noted
        self.read = self.differ = False
        self._places: weakref.ref[Tensor] | None = None  # of maxima, which the last choice was noted for
        self._left = None if noted is None else iter(noted)
        self._paused, self._turn, self._way = False, turn, (turn or 0) // 2 % 4
        self._draws, self._count = torch.Generator().manual_seed((turn or 0) % 2), 0

    def __exit__(self, *error: Any) -> None:
        self._forget_unused()
        super().__exit__(*error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the block, operations are none of the model's code."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._forget_unused()
        name = _name(func, args, kwargs)
        operands = _operands(func, name, args, kwargs)
        if self._paused or name is None or not operands or _tells_numbers(operands, args) or \
                any(x.is_nested for x in operands):  # in which channels are not followed
            return func(*args, **kwargs)
        before = self._before(name, operands)
        if before is None:
            out = func(*args, **kwargs)
            if name in _POOLS and self._left is None:
                self._places = weakref.ref(out[1])
            if name in _FLAT and self._left is None and not _is_flat(out, self.noted[-1][1] or operands):  # as it was
                self.noted[-1] = (name, None)
            return out
        written = _written(func, args, kwargs)
        copies = {id(x): x.clone() for x in written}
        if self._turn is None:
            copies |= {id(x): old.clone() for x, old in zip(operands, before, strict=True)}
        args, kwargs = tree_map_only(Tensor, lambda x: copies.get(id(x), x), (args, kwargs))
        out = func(*args, **kwargs) if self._turn is None else \
            self._otherwise(func, name, args, kwargs, operands, before)
        if not written:
            return out
        for x, value in zip(written, tensors_of(out), strict=True):
            x.resize_(value.shape).copy_(value) if x.shape != value.shape else x.copy_(value)
        return written[0] if len(written) == 1 else tuple(written)

    def _forget_unused(self) -> None:
        """Places of maxima that the code has let go by now, as after most max pools, are no choice."""
        if self._places is not None and self._places() is None:
            self.noted[-1] = (self.noted[-1][0], None)
        self._places = None

    def noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of Tensor that makes Python numbers of all its elements, and notes it."""
        def noting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._paused or _get_current_dispatch_mode() is not self or not x.is_floating_point():
                return method(x, *args, **kwargs)
            before = self._before(name, [x])
            if before is not None and self._turn is None:
                return method(before[0], *args, **kwargs)
            self.read |= before is not None and bool(_differ([x], before).any())
            return method(x, *args, **kwargs)

        return noting

    def _before(self, name: str, operands: Sequence[Tensor]) -> list[Tensor] | None:
        """What was noted where the code does what it does now; None where it is noted now, or goes another way."""
        if self._left is None:
            self.noted.append((name, [x.clone() for x in operands]))
            return None
        known, before = next(self._left, (None, []))
        if known == name and before is None:
            return None
        if known != name or before is None or [x.shape for x in before] != [x.shape for x in operands]:
            self._left = iter(())
            return None
        return before

    def _otherwise(self, func: Any, name: str, args: Any, kwargs: Any, operands: Sequence[Tensor],
                   before: Sequence[Tensor]) -> Any:
        """What `func` returns, but otherwise where its operands differ from what they were before."""
        differs = _differ(operands, before, args[_TABLES[name]] if name in _TABLES else None)
        self.differ |= bool(differs.any())
        if name in ALIKE:
            out, was = func(*args, **kwargs), func(before[0], *args[1:], **kwargs)
            if any(not torch.equal(x, old) for x, old in zip(tensors_of(out), tensors_of(was), strict=True)
                   if not x.is_floating_point()):
                return out  # it is otherwise
        if name in _POOLS:
            x, differs = (whole.flatten(-_POOLS[name]) for whole in (args[0], differs))
            turned = torch.where(differs.any(-1, keepdim=True), self._rolled(x, -1, False), x)
            return func(turned.reshape(args[0].shape), *args[1:], **kwargs)
        if name in ALONG or name in ALIKE:
            dim = _dim(func, args, kwargs)
            x, differs = (args[0].flatten(), differs.flatten()) if dim is None else (args[0], differs)
            alike = name in ALIKE
            changed = differs.any() if alike else differs.any(dim or 0, keepdim=True)
            turned = torch.where(changed, self._rolled(x, dim or 0, alike), x)
            return func(turned.view_as(args[0]), *args[1:], **kwargs)
        if name == "nonzero":
            turned = differs & (self._steps(differs.shape, 2) > 0).to(differs.device)
            return func(torch.where(turned, (args[0] == 0).to(args[0]), args[0]))
        out = func(*args, **kwargs)
        if name in _NUMBERS:
            self.read |= bool(differs.any())
            return out
        if isinstance(out, bool):
            return out ^ bool(differs.any() and self._steps((), 2))
        if not isinstance(out, Tensor) or out.is_complex():
            return out
        other = ~out if out.dtype == torch.bool else torch.zeros_like(out) if self._way == 3 else \
            out + 1 if name in _STEPS | _FLAT else \
            torch.where(out > 0, out - 1, out + 1)
        turned = (self._steps(out.shape, 2) > 0).to(out.device) | (self._way == 3 and out.dtype != torch.bool)
        return torch.where(turned & (differs if out.shape == differs.shape else differs.any()), other, out)

    def _rolled(self, x: Tensor, dim: int, alike: bool) -> Tensor:
        """x, each row of it along `dim` rolled by a number of steps of its own; alike: each place of `dim` is, so that
        some come to hold the same."""
        if not x.dim() or x.shape[dim] < 2 or not x.numel():
            return x
        if self._way == 3 and not alike:  # the same place in every row
            return x.sort(dim, descending=True).values
        places, dim = x.shape[dim], dim % x.dim()
        steps = self._steps([1 if (at == dim) != alike else size for at, size in enumerate(x.shape)], places)
        index = torch.arange(places).view([places if at == dim else 1 for at in range(x.dim())])
        return x.gather(dim, ((index - steps) % places).expand(x.shape).to(x.device))

    def _steps(self, shape: Sequence[int], places: int) -> Tensor:
        """By how many of `places` choices go on, int64: none by 0 in turns 0 and 1; in 4 and 5 those differ from their
        neighbours that do not in 2 and 3."""
        draws = torch.randint(places, tuple(shape), generator=self._draws)
        self._count += 1
        if self._way == 0:
            return 1 + draws % (places - 1)
        return (draws + (torch.arange(draws.numel()).view(shape) + self._count) % 2) % places if self._way == 2 else \
            draws


def _differ(operands: Sequence[Tensor], before: Sequence[Tensor], table: object = None) -> Tensor:
    """Where they differ, bool, of the shape that they are broadcast to; everywhere, if the `table` among them does."""
    differs = torch.zeros((), dtype=torch.bool, device=operands[0].device)
    for x, old in zip(operands, before, strict=True):
        each = ~close(x, old)
        differs = differs | (each.any() if x is table else each)
    return differs


def _name(func: Any, args: Any, kwargs: Any) -> str | None:
    """The name of an operation that chooses, be it in place or not; None of another."""
    operation = name_of(func).removesuffix("_")
    if not operation:
        return None
    dtype = args[0].dtype if operation == "copy" else kwargs.get("dtype")
    if operation in ("_to_copy", "copy") and (dtype is None or dtype.is_floating_point or dtype.is_complex):
        return None
    if operation == "div" and kwargs.get("rounding_mode") is None:
        return None
    return next((name for name in (operation, f"{operation}.{func._overloadname}") if name in _KNOWN), None)


def _is_flat(out: Tensor, operands: Sequence[Tensor]) -> bool:
    """Whether one number was made of several, or of one number another."""
    made = out.flatten()
    some = made[::max(len(made) // _SOME, 1)]
    if not len(made) or not all(bool((part == made[0]).all()) for part in (some, made)):
        return False
    x = operands[0].flatten()
    return not bool((x == x[:1]).all() and x[0] == made[0])


def _operands(func: Any, name: str | None, args: Any, kwargs: Any) -> list[Tensor]:
    """What an operation chooses by."""
    if name in _POOLS or name is None:
        return [args[0]] if name else []
    if name == "bernoulli" and name_of(func).endswith("_"):  # which writes to its first argument, and reads none
        args = args[1:]
    given = {key: value for key, value in kwargs.items() if not any(
        argument.name == key and argument.is_out for argument in func._schema.arguments)}
    return [x for x in tensors_of((args, given)) if x.is_floating_point()]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What an operation writes its results to: the first argument of one in place, or out=."""
    return [kwargs[argument.name] if argument.kwarg_only else args[place]
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            and (argument.name in kwargs or not argument.kwarg_only)]


def _tells_numbers(operands: list[Tensor], args: Any) -> bool:
    """Whether a comparison asks for NaN or infinity: x == x, x == inf."""
    other = args[1] if len(args) > 1 else None
    return (len(operands) == 2 and operands[0] is operands[1]) or (isinstance(other, float) and abs(other) == torch.inf)


def _dim(func: Any, args: Any, kwargs: Any) -> int | None:
    """The dimension along which an operation chooses; None for all at once."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            dim: int | None = args[place] if place < len(args) and not argument.kwarg_only else \
                kwargs.get("dim", argument.default_value)
            return dim
    return None if "unique" in name_of(func) else -1  # of multinomial
