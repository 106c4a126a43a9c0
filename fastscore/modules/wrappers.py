"""What stands around a model, or around parts of it, for training: on several devices, or with less memory."""

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


class _PlainCall:
    """In place of checkpoint.CheckpointFunction."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Within the block, reentrant activation checkpoints call their layers as they are.

    They hide a part of the autograd graph, and take backward() alone.
    """
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _PlainCall  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
