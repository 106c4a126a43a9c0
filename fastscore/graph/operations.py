"""Operations of PyTorch by what they do, as those see them who look on at a run of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# that choose along a dimension of their first argument
ALONG = {"argmax", "argmin", "topk", "sort", "argsort", "max.dim", "min.dim", "kthvalue", "mode", "multinomial",
         "median.dim", "nanmedian.dim", "cummax", "cummin"}
# that tell what is alike in their first argument
ALIKE = {"_unique", "_unique2", "unique_dim", "unique_consecutive"}


def name_of(func: Any) -> str:
    """What an operation is called, with a _ behind it where it is in place; "" of what is none."""
    return func._schema.name.split("::")[-1] if isinstance(func, torch._ops.OpOverload) else ""


@contextmanager
def python_numbers(noting: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """In the block, methods of Tensor that make Python numbers of all its elements, which no operation is seen of, are
    `noting(name, method)`."""
    names = ("tolist", "numpy")  # inherited by Tensor
    for name in names:
        setattr(Tensor, name, noting(name, getattr(Tensor, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(Tensor, name)
