"""Operations of PyTorch by what they do, as those see them who look on at a run of a model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastscore.modules.operations_run import OperationsRun

M = TypeVar("M", bound="OperationsAndNumbers")

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
    """In the block, in this thread, methods of Tensor that make Python numbers of all its elements, which no operation
    is seen of, are `noting(name, method)`."""
    noted = vars(_of_thread).setdefault("noted", [])
    noted.append(noting)
    with _installing:
        _blocks.append(None)
        for name, method in _TO_PYTHON.items() if len(_blocks) == 1 else ():
            setattr(Tensor, name, _noted(name, method))
    try:
        yield
    finally:
        noted.pop()
        with _installing:
            _blocks.pop()
            for name in () if _blocks else _TO_PYTHON:
                delattr(Tensor, name)


class OperationsAndNumbers(OperationsRun):
    """In the block, `operation` runs in the place of each operation, and what `noting` makes in the place of a method
    that makes Python numbers."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._numbers = python_numbers(self.noting)

    def __enter__(self: M) -> M:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._numbers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._numbers.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """What runs in the place of a method of Tensor of that name."""
        raise NotImplementedError


_TO_PYTHON: dict[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}  # inherited
_of_thread, _installing = threading.local(), threading.Lock()
_blocks: list[None] = []  # that threads are in


def _noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = method
        for noting in vars(_of_thread).get("noted", ()):
            made = noting(name, made)
        return made(x, *args, **kwargs)

    return call
