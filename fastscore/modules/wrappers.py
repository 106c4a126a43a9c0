"""Models that stand in a wrapper for training on several devices."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")  # fully_shard and its forerunner, slow to import


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DataParallel, which names its layers without "module."."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters are sharded: a copy of it cannot run."""
    for name, module in model.named_modules():
        if any(cls.__name__ in _SHARDED for cls in type(module).__mro__):
            raise ValueError(
                f"model: the parameters of {name or type(model).__name__} are sharded, and what is done here is done "
                "on a copy, which needs them whole: load torch.distributed.checkpoint.state_dict.get_model_state_dict("
                "model, options=StateDictOptions(full_state_dict=True)) into a model that is not sharded; or use a "
                "Scorer in the training loop, with the ChannelGraph that fastscore.graph.tracing.trace found before "
                "sharding")
