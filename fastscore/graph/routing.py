"""What a model's code decides by what a batch holds: which rows go where, above all.

Rows that are routed (experts, sorted or picked tokens, padding that is left out) may lie in regular order in whatever
batch is tried, and in another one in the next. So what depends on a batch's content is followed through every operation
of a run, and where an operation makes a decision of it, another one can be put in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastscore.batches.parts import Batch, memory_of, tensors_of
from fastscore.graph.following import operations

# operations that choose among the elements of their first argument
_CHOICES = operations.ALONG | {"bucketize", "searchsorted", "aminmax", "nms"}
# operations that say yes or no to each element, or count
_ANSWERS = {"gt", "lt", "ge", "le", "eq", "ne", "logical_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or",
            "bitwise_not", "isin", "_to_copy", "floor_divide", "remainder"}
# operations that take no more than shape and dtype from their arguments
_OF_SHAPES = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
              "new_empty", "new_full", "new_empty_strided"}


# operations that take rows of their first argument
_ROWS = {"embedding", "index", "index_select"}


class Decisions(operations.OperationsAndNumbers):
    """Within the block, `found` says whether an operation decides anything by what `batch` holds; `read` whether a
    Python number was made of it; and `picks` whether integers of it, or answers, were, or came to anything but other
    integers, tables of what the batch does not hold, and casts: then what a sample's rows are may depend on them.

    seed: of other decisions, which take the place of those. They are a function of their operand, so that a decision
    that the code takes twice is the same twice; None: they stay.
    """

    def __init__(self, batch: Batch, seed: int | None = None) -> None:
        super().__init__()
        self.found, self.read, self.picks, self._seed = False, False, False, seed
        self._decided = set[int]()
        self._content: dict[int, StorageWeakRef] = {}  # kept, a weak reference keeps its address from being taken again
        for tensor in tensors_of(batch):
            self._mark(tensor)

    def noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of Tensor that makes Python numbers of all its elements, and notes it."""
        def noting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if memory_of(x) in self._content:
                self.read = self.picks = True
            return method(x, *args, **kwargs)

        return noting

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        operation = operations.name_of(func)
        content = [] if not operation or operation in _OF_SHAPES else \
            [tensor for tensor in tensors_of((args, kwargs)) if memory_of(tensor) in self._content]
        if not content:
            return func(*args, **kwargs)
        self.read |= operation == "_local_scalar_dense"
        of_a_table = operation in _ROWS and memory_of(args[0]) not in self._content
        operand = args[0] if args and isinstance(args[0], Tensor) and args[0].numel() > 1 else None
        # integers that come of a decision, such as an order and its inverse, belong to it
        decided = any(memory_of(tensor) in self._decided for tensor in content if not tensor.is_floating_point())
        operand = operand if operand is not None and (operand.is_floating_point() or not decided) else None
        if operand is not None and not _CHOICES.isdisjoint((operation, f"{operation}.{func._overloadname}")):
            self.found = decided = True
            args = args if self._seed is None else (_shuffled(operand, self._seed), *args[1:])
        elif operand is not None and (operation in operations.ALIKE or operation == "nonzero"):
            self.found = decided = True
            other = _repeated if operation in operations.ALIKE else _with_zeros
            args = args if self._seed is None else (other(operand, self._seed), *args[1:])
        out = func(*args, **kwargs)
        self.picks |= not of_a_table and operation != "_to_copy" and not all(map(_is_real, content)) and \
            (any(map(_is_real, tensors_of(out))) or operation == "_local_scalar_dense")
        if operand is not None and operation in _ANSWERS and isinstance(out, Tensor) and out.numel() > 1 \
                and not out.is_floating_point() and not out.is_complex():
            self.found = decided = True
            out = out if self._seed is None else other_answers(out, self._seed)
        for tensor in tensors_of(out):
            self._mark(tensor, decided)
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, Tensor):
                    self._mark(value, decided)
        return out

    def _mark(self, tensor: Tensor, decided: bool = False) -> None:
        if place := memory_of(tensor):
            self._content.setdefault(place, StorageWeakRef(tensor.untyped_storage()))
            if decided and not tensor.is_floating_point():
                self._decided.add(place)


def _is_real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def other_answers(answers: Tensor, seed: int) -> Tensor:
    """The same integers, or bools, in another order; where all are one, a quarter of them is 0 (or 1)."""
    if bool((answers == answers.flatten()[0]).all()):
        return torch.where(_quarter(answers, seed), (answers == 0).to(answers.dtype), answers)
    return _shuffled(answers, seed)


def _repeated(x: Tensor, seed: int) -> Tensor:
    """The same in another order, a quarter of it as what is before it."""
    x = _shuffled(x, seed)
    return torch.where(_quarter(x, seed), x.flatten().roll(1).view(x.shape), x)


def _with_zeros(x: Tensor, seed: int) -> Tensor:
    return torch.where(_quarter(x, seed), torch.zeros_like(x), x)


def _quarter(x: Tensor, seed: int) -> Tensor:
    """True in a quarter of the places of x."""
    return (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.25).to(x.device)


def _shuffled(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + x.numel())
    order = torch.randperm(x.numel(), generator=generator).to(x.device)
    return x.reshape(-1)[order].view(x.shape)
