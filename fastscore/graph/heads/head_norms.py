"""Normalisations over all heads of an attention together, as of OLMo 2's queries and keys: heads that go leave them,
which go on dividing by the dense width. Known by name, and tried with the attention: see
fastscore.graph.heads.attention.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup, Member
from fastscore.modules.hooks import reading_zero
from fastscore.modules.inspection import channel_dim
from fastscore.modules.norms.channel_norms import norm_of, width

# what normalises queries, and keys
_NAMES = (("q_norm", "norm_q", "query_norm", "q_layernorm"), ("k_norm", "norm_k", "key_norm", "k_layernorm"))


def with_norms(module: nn.Module, group: ChannelGroup, layers: tuple[str, ...]) -> ChannelGroup:
    """The heads of an attention module, and the normalisations that count all of them.

    layers: of the module, which make its queries and keys.
    """
    made = {member.layer: member for member in group.role("producer")}
    members = []
    for names, layer in zip(_NAMES, layers, strict=False):
        for name in names if layers.count(layer) == 1 and layer in made else ():
            norm = module._modules.get(name)
            if norm is not None and width(norm) == len(made[layer].index) and norm_of(norm) is not None:
                members.append(Member(name, "norm", made[layer].index, made[layer].channel))
    return replace(group, members=(*group.members, *members))


def uncounted(module: nn.Module, group: ChannelGroup, gone: Tensor, whole: bool = False) -> Iterator[Any]:
    """Hooks by which these normalisations count channels of `gone` (int64 [R]) as zeros, and layers through which heads
    read each other read zeros of them; whole: and those that read heads."""
    for member, index in group.removed_at(gone):
        between = member.role == "consumer" and (whole or len(member.index) < group.channels)
        if between or member.role == "norm":
            layer = module.get_submodule(member.layer)
            zero = reading_zero(index, channel_dim(layer) if between else -1)
            yield layer.register_forward_pre_hook(zero, with_kwargs=True)
