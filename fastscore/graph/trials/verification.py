"""Traced groups, verified on the model itself.

The tracer takes every operation it does not know for elementwise. So some channels are changed where they are made,
whatever else a Conv or Linear makes is held at what it was, and the change may show nowhere but at the positions that
the groups claim for those channels.
"""

import zlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.groups import READS, ChannelGroup, Role
from fastscore.graph.trials.choices import HELD, TURNS
from fastscore.graph.trials.recording import Recording
from fastscore.modules.weights.parameter_layers import ParameterLayer

_PASSES = 4  # of a random half of the channels and the other half, twice: which miss one slip in 4, and 32 in 10^4


def leaks(recording: Recording, groups: Sequence[ChannelGroup], chosen: bool = False, held: bool = False
          ) -> dict[str, str]:
    """Where channels show that no member of their group claims: name of a group -> a layer whose input changes with its
    channels, or "the output".

    chosen: whether what the model's code chooses by these channels is to be chosen otherwise. held: whether it is to be
    chosen as it was, whatever they are.
    """
    assert recording.inputs is not None  # of the model as it is, before anything is changed
    if not groups or (chosen and not recording.choices):
        return {}
    turns = range(TURNS) if chosen else _turns(held)
    where = _verify(recording, groups, turns)
    if where is None:
        return {}
    found = {group.name: alone for group in groups if (alone := _verify(recording, [group], turns)) is not None}
    return found or {group.name: where for group in groups}


def nothing_leaks(recording: Recording, groups: Sequence[ChannelGroup]) -> bool:
    """Whether `leaks` finds nothing, for less where it does: the groups are not tried one by one."""
    return _verify(recording, groups, _turns()) is None


def _turns(held: bool = False) -> list[int | None]:
    return [HELD if held else None] * _PASSES


def _verify(recording: Recording, groups: Sequence[ChannelGroup], turns: Sequence[int | None]) -> str | None:
    # a generator for each group: what shows among the others shows alone
    generators = [torch.Generator().manual_seed(zlib.crc32(group.name.encode())) for group in groups]
    made = _channels_at(groups, recording.norms, "producer")
    read = _channels_at(groups, recording.norms, *READS)
    copies = {layer: found for layer, found in _channels_at(groups, (), "tensor").items() if layer in recording.layers}
    held = list(_held(recording.model, groups))
    for pair in zip(turns[::2], turns[1::2], strict=True):
        half = torch.cat([torch.rand(len(group.unit), generator=generator)[group.unit] < 0.5
                          for group, generator in zip(groups, generators, strict=True)])
        for turn, side in zip(pair, (half, ~half), strict=True):
            with entries_changed((owner, name, other, dim, index[side[channel]])
                                  for owner, name, other, dim, index, channel in held):
                of_layers, of_readers, of_copies = ({layer: index[side[channel]] for layer, (index, channel) in
                                                     found.items()} for found in (made, read, copies))
                where = recording.leak(of_layers, of_readers, turn, of_copies)
            if where is not None:
                return where
    return None


def _channels_at(groups: Sequence[ChannelGroup], norms: Container[str], *roles: Role
                 ) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer that plays one of `roles`, or is one of `norms` -> (its positions, the channel at each, counted through
    all groups), int64."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    begin = 0
    for group in groups:
        for member in group.members:
            if member.role not in roles and member.layer not in norms:
                continue
            found[member.layer].append((member.index, member.channel + begin))
        begin += len(group.unit)
    return {layer: (torch.cat(index), torch.cat(channel))
            for layer, pairs in found.items() for index, channel in [zip(*pairs, strict=True)]}


def _held(model: nn.Module, groups: Sequence[ChannelGroup]
          ) -> Iterator[tuple[nn.Module, str, Tensor, int, Tensor, Tensor]]:
    """(module, name there, other numbers, dimension, positions, the channel at each, counted through all groups) of
    each parameter and buffer that loses channels, but for those of layers that make or read them."""
    begin = 0
    for group in groups:
        for member in group.role("tensor", "channelwise"):
            owner, name, dim = model.get_submodule(member.module), member.layer.rpartition(".")[2], member.dim
            if isinstance(layer := owner._modules.get(name), ParameterLayer):  # one for each head, say
                owner, name, dim = layer, "weight", layer.at(dim)
            own = {name: getattr(owner, name)} if member.role == "tensor" else \
                {**owner._parameters, **owner._buffers}
            for key, tensor in own.items():
                if tensor is not None and tensor.dim() > dim and tensor.shape[dim] > int(member.index.max()):
                    yield owner, key, another(tensor), dim, member.index, member.channel + begin
        begin += len(group.unit)


@contextmanager
def entries_changed(held: Iterable[tuple[nn.Module, str, Tensor, int, Tensor]]) -> Iterator[None]:
    """In the block, (module, name there, other numbers, dimension, positions) hold the other numbers there."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for owner, name, other, dim, index in held:
            kept: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
            old: Tensor = kept[name]
            before.append((kept, name, old))
            at = index.to(old.device)
            new = old.detach().index_copy(dim, at, other.index_select(dim, at))
            kept[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        yield
    finally:
        for kept, name, old in reversed(before):
            kept[name] = old


def another(x: Tensor) -> Tensor:
    """Numbers further from zero; of integers, which may be places in a tensor, closer ones."""
    x = x.detach()
    if x.dtype == torch.bool:
        return ~x
    if not x.is_floating_point() and not x.is_complex():
        return torch.where(x > 0, x - 1, x + 1)
    return x * 1.5 + torch.where(x < 0, -0.5, 0.5).to(x)
