"""What stands around a model, or around parts of it, for training: on several devices, or with less memory."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import checkpoint

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")  # fully_shard and its forerunner, slow to import


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DataParallel, which names its layers without "module."."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are sharded: a copy of it cannot run.

    Raises:
        ValueError: it is sharded.
    """
    for name, module in model.named_modules():
        if any(cls.__name__ in _SHARDED for cls in type(module).__mro__):
            raise ValueError(
                f"model: the parameters of {name or type(model).__name__} are sharded, and what is done here is done "
                "on a copy, which needs them whole: load torch.distributed.checkpoint.state_dict.get_model_state_dict("
                "model, options=StateDictOptions(full_state_dict=True)) into a model that is not sharded; or use a "
                "Scorer in the training loop, with the ChannelGraph that fastscore.graph.tracing.trace found before "
                "sharding")


_inside: Counter[int] = Counter()  # thread -> blocks of without_checkpoints that it is in
_lock = threading.Lock()
_replaced: list[Any] = []  # checkpoint.CheckpointFunction, while some thread is in a block


class _PlainCall:
    """In place of checkpoint.CheckpointFunction, for threads within a block; others have what it replaces."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        original = None if _inside[threading.get_ident()] else next(iter(_replaced), None)
        return function(*args) if original is None else original.apply(function, preserve_rng_state, *args)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Within the block, reentrant activation checkpoints of this thread call their layers as they are.

    They hide a part of the autograd graph, and take backward() alone. Blocks of several threads may overlap: the last
    to end brings back what the first found.
    """
    thread = threading.get_ident()
    with _lock:
        if not _inside.total():
            _replaced.append(checkpoint.CheckpointFunction)
            checkpoint.CheckpointFunction = _PlainCall  # type: ignore[misc, assignment]
        _inside[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[thread] -= 1
            if not _inside.total():
                checkpoint.CheckpointFunction = _replaced.pop()  # type: ignore[misc]
                _inside.clear()
