"""What stands for CUDA graphs where there is no GPU: operations are noted, and run again on the same memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")
NOT_PERMITTED = "operation not permitted when stream is capturing"
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
         aten.unique_dim.default, aten._unique2.default, aten.repeat_interleave.Tensor}
LOOKS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Notes every operation; as a capture does, refuses those whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func is aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1])
        if func in WAITS or masked:
            raise RuntimeError(f"{func}: {NOT_PERMITTED}")
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    def fresh(self) -> Iterator[tuple[Any, list[Tensor]]]:
        """(operation, those of its results that are no other tensor's memory)"""
        for func, args, kwargs, out in self.steps:
            if not func.is_view:
                yield func, [x for x in tensors(out) if not any(x is y for y in tensors((args, kwargs)))]

    def forget(self) -> None:
        """Nothing has been computed by a capture."""
        with torch.no_grad():
            for _, results in self.fresh():
                for x in results:
                    x.detach().fill_(torch.nan if x.is_floating_point() else 77)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr() and "empty" not in str(func):  # else it was written in place
                    old.detach().copy_(new)


class HostRecorder:
    """A Recorder (see fastscore.fastpath.graphs) for a CPU. replays: how often each recording ran."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self.operations: list[int] = []

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        tape = Tape()
        with nobody_looks(), tape:
            result = work()
        tape.forget()
        number = len(self.replays)
        self.replays.append(0)
        self.operations.append(len(tape.steps))

        def replay() -> None:
            self.replays[number] += 1
            tape.replay()

        return result, replay


@contextmanager
def nobody_looks() -> Iterator[None]:
    """Inside, whoever asks the host for a tensor's value gets what a capture has to say."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LOOKS:
            def refuse(self: Tensor, *args: Any, name: str = name, **kwargs: Any) -> Any:
                raise RuntimeError(f"Tensor.{name}: {NOT_PERMITTED}")

            patch.setattr(Tensor, name, refuse)
        yield
