"""Which parameters a model's code writes to when it runs, as its first run shows, whichever way the code goes: rows of
a table that F.embedding(ids, table, None, 1.0) scales, a weight that a function of another file clamps."""

import weakref
from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from fastscore.modules.operations_run import OperationsRun
from fastscore.modules.written_state import storage_of

_written: "weakref.WeakKeyDictionary[nn.Module, frozenset[str]]" = weakref.WeakKeyDictionary()


def note(model: nn.Module, names: Set[str]) -> None:
    """Remember of a model, for as long as it lives, the parameters that its code writes to."""
    if names or model in _written:
        _written[model] = frozenset(names)


def noted(model: nn.Module) -> frozenset[str]:
    """The names that were remembered of a model."""
    return _written.get(model, frozenset())


class WouldWriteError(Exception):
    """The name of a parameter that code is about to write to."""


class Writing(OperationsRun):
    """Notes which parameters of a copy are written to in the block, and stops before those that lie in the memory of
    `model`, which it is a copy of."""

    def __init__(self, copy: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self._users = {storage_of(parameter) for parameter in model.parameters()}
        self._names: dict[Any, list[str]] = {}
        for name, parameter in copy.named_parameters():
            self._names.setdefault(storage_of(parameter), []).append(name)
        self._written, self._stopped = set[str](), False

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.is_write:
                    given = kwargs.get(argument.name) if place >= len(args) else args[place]
                    for tensor in given if isinstance(given, (list, tuple)) else [given]:
                        self._see(tensor)
        return func(*args, **kwargs)

    def _see(self, tensor: Any) -> None:
        names = self._names.get(memory := storage_of(tensor)) if isinstance(tensor, Tensor) else None
        if names is not None:
            self._written.update(names)
            if memory in self._users:
                self._stopped = True  # the model's code may catch what is raised
                raise WouldWriteError(names[0])

    def remember(self, model: nn.Module) -> bool:
        """Remember what was noted of `model`, so that copies of it have memory of their own for that; whether it is to
        run once more: it was stopped, and copies have memory of their own for everything now."""
        every = frozenset(name for name, _ in model.named_parameters())
        again = self._stopped and noted(model) != every
        note(model, every if again or not self._written <= every else self._written)
        return again
