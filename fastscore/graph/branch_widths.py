"""How wide the zeros are that stand for the modules of a residual branch whose code changes how many channels there are
between them, as of a gate and what it gates, or of what it concatenates."""

from collections.abc import Mapping

from torch import nn

from fastscore.graph.following.cuts import LAYERS
from fastscore.graph.following.residual_sums import Call, Calls
from fastscore.graph.layer_types import type_of
from fastscore.modules.inspection import channel_dim
from fastscore.modules.zero_branch import WIDER


def as_wide(modules: Mapping[str, nn.Module], call: Call, before: tuple[tuple[str, int], ...], calls: Calls
            ) -> tuple[tuple[str, int], ...]:
    """What runs `before` the module that makes a `call`: where code makes less of the channels of the one layer among
    it that changes how many there are, as chunk(2) does, the zeros of that are as many times as wide."""
    changing = [(name, made) for name, _ in before for made in calls[name][:1]
                if made is not None and made.shape != made.read]
    if len(changing) == 1:
        name, made = changing[0]
        if type_of(modules[name]) in LAYERS and not made.returns and len(made.shape) == len(call.read):
            dim = channel_dim(modules[name])
            times, rest = divmod(made.shape[dim], call.read[dim])
            if times > 1 and not rest:
                return tuple((other, times * WIDER if other == name else returns) for other, returns in before)
    return before


def may_be_one_wide(last: nn.Module, call: Call) -> bool:
    """Whether a module may make zeros of one channel, which are as wide as the stream where they are added to it:
    whatever code makes of what runs before it, which it concatenates, say."""
    return type_of(last) in LAYERS and not call.returns
