"""Biases of heads that the module around attentions makes and gives to all of them, as MPNet's encoder does: the heads
of all go together, with the columns of the embedding that the biases are looked up in."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import heads, surgery
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.heads.attention_calls import Call, close
from fastscore.graph.trials.recording import Recording
from fastscore.modules.attention import handed
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.inspection import channel_dim
from fastscore.modules.narrower import staying, without

_NAME = "relative_attention_bias"
_ROUNDING = 1e-3  # of a channel's length


def maker(model: nn.Module, attentions: Iterable[str], heads: int) -> str | None:
    """The embedding that biases for the heads of some attention modules, by name, of so many each, may be looked up in;
    None without one."""
    names = list(attentions)
    for name, module in model.named_modules():
        owner, _, own = name.rpartition(".")
        if own == _NAME and isinstance(module, nn.Embedding) and module.embedding_dim == heads and \
                all(other.startswith(f"{owner}." if owner else "") and other != owner for other in names):
            return str(name)
    return None


def with_arguments(module: nn.Module, group: ChannelGroup, call: Call) -> ChannelGroup | None:
    """The heads of an attention module, which reads a part of what it is given for each head; None where it is given
    no such thing."""
    each = next(group.role("heads"))
    arguments = [name for name in handed.biases(module, call.args, call.kwargs, len(each.index))
                 if name not in call.handed]
    if not arguments or heads.count(module) != len(each.index):
        return None
    return replace(group, members=(*group.members, replace(each, role="handed", attribute=",".join(arguments))))


def with_embedding(recording: Recording, group: ChannelGroup, embedding: str) -> ChannelGroup | None:
    """The group of heads with the columns of an embedding; None where the model, with other numbers there, reads other
    heads without some. group: the heads of all attentions that are given its biases."""
    each = next(group.role("heads"))
    column = Member(embedding, "producer", torch.arange(len(each.index)), each.channel)
    group = replace(group, members=(*group.members, column))
    dense = evaluation_copy(recording.model)
    weight: Any = dense.get_submodule(embedding).weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data = drawn.to(weight)
    with recording.computing([embedding]):
        try:
            want = _read(recording, dense, group, {})
            for last in (False, True):
                gone = (group.unit % 2 == int(last)).nonzero()[:, 0]
                stays, positions = staying(group.channels, gone), surgery.removed_indices([group], {group.name: gone})
                small = surgery.remove_indices(evaluation_copy(dense), positions)
                got = _read(recording, small, group, positions)
                if any(layer not in got or not close(got[layer], whole[..., stays.to(whole.device)], _ROUNDING)
                       for layer, whole in want.items()):
                    return None
        except Exception:  # whatever the model's code does with fewer heads
            return None
    return group


def _read(recording: Recording, model: nn.Module, group: ChannelGroup, gone: surgery.RemovedIndices
          ) -> dict[str, Tensor]:
    """What each layer that reads the heads reads in a run of `model`, a copy of the recorded one without `gone`."""
    seen: dict[str, Tensor] = {}

    def see(layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(layer, input_of(args, kwargs).detach())

    with put_on(model.get_submodule(edge.layer).register_forward_pre_hook(partial(see, edge.layer), with_kwargs=True)
                for edge in group.role("consumer")):
        _run_without(recording, model, gone)
    return seen


def _run_without(recording: Recording, model: nn.Module, gone: surgery.RemovedIndices) -> Tensor:
    """The output of a run of `model`, a copy of the recorded one whose layers lack outputs: they give the rest of what
    they gave."""
    def forward_of(name: str) -> Callable[..., Tensor]:
        calls, layer, positions = iter(recording.outputs[name]), model.get_submodule(name), gone.get((name, "outputs"))

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            full = next(calls, None)
            if full is None:  # one call more than before
                computed: Tensor = type(layer).forward(layer, *args, **kwargs)
                return computed
            return full.clone() if positions is None else without(full, channel_dim(layer), positions)

        return forward

    return recording.replay({name: forward_of(name) for name in recording.outputs}, model)
