"""The groups of channels that a traced graph shows, layer by layer."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastscore.graph import units
from fastscore.graph.following import contractions, dependencies, index_maps, kept_widths, lost_ways
from fastscore.graph.following.cuts import LAYERS
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS
from fastscore.graph.groups import READS, TIED, ChannelGraph, ChannelGroup, Member, Role
from fastscore.graph.kept import reasons, unread
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.graph.trials.recording import Recording
from fastscore.modules.inspection import parameter_owners
from fastscore.modules.weights.own_convolution import OwnConvolution
from fastscore.modules.weights.own_linear import TiedLinear
from fastscore.modules.weights.own_products import OWN


def of_graph(model: nn.Module, graph: dependencies.Graph, taken: Mapping[str, set[str]], recording: Recording,
             unused: Container[str], idle: Collection[str], roots: Collection[str] | None = None) -> ChannelGraph:
    """The groups of what the layers of a model, an evaluation copy, make, and the reason for what is kept.

    graph: as the tracer left it. taken: role -> layers that play it in groups of heads, and in no other. recording: of
    the run that was traced. unused: layers that ran, and that the output does not depend on: they may read what can go.
    idle: those of which no gradient comes back. roots: layers of whose channels alone groups are made; None: of all.
    """
    groups: list[ChannelGroup] = []
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}  # producers of what is kept -> the first of them
    untraced: list[str] = []
    partly: dict[str, str] = {}  # producers of a part of what goes together -> why they do not go alone
    kept = set[str]()  # producers of all that has a reason
    seen = set(taken["producer"])
    called_otherwise = set[str]().union(*taken.values())  # by an attention's own function
    layers = dict(model.named_modules())
    owners = parameter_owners(model)
    work: list[tuple[str, nn.Module, np.ndarray | None]] = [
        (name, layer, None) for name, layer in layers.items() if roots is None or name in roots]
    for name, module, part in work:
        node = graph.module2node.get(module)
        kind = type_of(module)
        if (name in idle and kind in PRODUCERS) or (node is None and kind in PRODUCERS
                                                      and name not in called_otherwise):
            untraced.append(name)
            continue
        if node is None or node.type not in PRODUCERS or (name in seen and part is None):
            continue
        positions, reason, came = graph.positions_of(node, others=name in partly, part=part)
        lost = {} if reason is None else lost_ways.lost(graph, came)
        members = _members(graph, lost_ways.sure(positions, lost), layers, unused)
        if reason is None and graph.chunks_others(positions):
            if name not in partly:  # the layer that makes all of them may come yet
                work.append((name, module, None))
            partly[name] = "its channels are cut into equal parts together with others (SplitBackward0)"
            continue
        if reason is None and graph.pads_others(positions):
            partly[name] = "constants are padded to its channels, as many whatever goes (ConstantPadNdBackward0)"
            continue  # the layer whose channels they are padded to may come yet
        if reason is not None:
            reason = reasons.read_elsewhere(members, graph.calls.read_elsewhere) or reason
        elif (reason := contractions.end(graph, positions)) is None:
            reason = reasons.of_group(layers, members, owners, recording, graph.calls.read_elsewhere)
            if reason == reasons.UNREAD:
                reason = lost_ways.unread(graph, positions) or reason
            if reason is not None and reason.startswith(reasons.CHANGES) and graph.writes_parts(positions):
                reason = "a part of its channels is written to in place (x[:, :k] = ...), which cannot be followed"
            if reason is not None or not kept.isdisjoint(member.layer for member in members):
                lost = lost_ways.lost(graph, came)
            near = _members(graph, lost_ways.sure(positions, lost), layers, unused) if lost else members
            far = {member.layer for member in members}.difference(member.layer for member in near)
            if lost and (reason is not None or not far.isdisjoint(kept)):
                members = near
                read = any(member.role == "consumer" for member in near)
                nearer = reasons.of_group(layers, near, owners, recording, graph.calls.read_elsewhere) if read else None
                along = next((why for why in lost.values() if lost_ways.ALONG in why), None)  # which says more
                changes = nearer is not None and nearer.startswith(reasons.CHANGES)
                reason = (along if changes else None) or nearer or next(iter(lost.values()))
        if reason is None or lost:
            reason = reasons.of_ranges(layers, members) or reason
        producers = [member.layer for member in members if member.role == "producer"]
        seen.update(producers)
        reason = reason or next(
            (f"its channels run into the heads of {member.layer}" for member in members
             if member.layer in taken.get(member.role, ())), None)
        if reason is None:
            channels = graph.get_out_channels(module) if part is None else len(part)
            unit = units.units_of(layers, channels, members, graph.chunks(positions))
            if int(unit.max()) > 0:
                members += kept_widths.of_group(graph, positions, unit)
                if why := kept_widths.written(graph, positions, unit):
                    graph.written[name] = why
                groups.append(ChannelGroup(name, channels, unit, tuple(units.first_channel_of_each_index(members)),
                                           units.least_of(layers, unit, members)))
                for producer in producers:
                    skipped.pop(producer, None)
                continue
            reason = reasons.ONE if channels == 1 else "all its channels can only be removed together"
        if part is not None:
            continue  # the reason of the whole says what keeps it
        if (free := graph.free_part(node)) is not None:
            work.append((name, module, free))
        skipped[name] = reason
        kept.update(producers)
        tied.update((producer, name) for producer in producers)
        tied.update((member.layer, name) for member in members if member.role == "tensor"
                    and layers[member.module].get_parameter(member.layer.rpartition(".")[2]).dim() > 1)
    covered = {member.layer for group in groups for member in group.members if member.role not in (*READS, "width")}
    # as of an embedding whose weight another one holds, or code reads as a parameter of its own
    untraced = [name for name in untraced if covered.isdisjoint((name, f"{name}.weight"))]
    if untraced:
        skipped |= reasons.of_untraced(untraced, idle, recording, graph.calls.read_elsewhere, graph.calls.read_detached)
    skipped |= {name: why for name, why in partly.items() if name not in covered and name not in tied}
    skipped |= {layer: f"{TIED}{first}" for layer, first in tied.items()
                if layer not in covered and layer not in skipped}
    return ChannelGraph(tuple(groups), skipped, graph.normalized_by)


def _members(graph: dependencies.Graph, positions: dependencies.Positions, layers: Mapping[str, nn.Module],
             unused: Container[str]) -> list[Member]:
    found = [member for key in positions if (member := _member(graph, key, positions[key])) is not None]
    found += _uncalled(graph, layers, found)
    return [unread.without_edge(member) if member.layer in unused else member for member in found]


def _member(graph: Any, key: tuple[Any, Any], positions: np.ndarray) -> Member | None:
    node, function = key
    index, channel = torch.from_numpy(positions >> 32), torch.from_numpy(positions & index_maps.CHANNEL)
    if node.type == OPTYPE.PARAMETER:
        dim = graph.dim_of(node)
        return None if dim is None else Member(node._name, "tensor", index, channel, dim)
    if node.type in CHANNELWISE:
        role: Role = "channelwise"
    elif node.type == NORM:
        role = "norm"
    elif node.type in PRODUCERS:
        reads = node.type in LAYERS and function == graph.get_pruner_of_module(node.module).prune_in_channels
        role = "consumer" if reads else "producer"
    else:
        return None
    return held(node.module, Member(graph._module2name[node.module], role, index, channel))


def held(layer: nn.Module | None, member: Member) -> Member:
    """A member, with what surgery is to cut of a parameter that a module's code multiplies by, where its layer is one.
    """
    if not isinstance(layer, OWN) or member.role not in ("producer", *READS, "channelwise"):
        return member
    holds, reads = member.layer, member.role in READS
    if isinstance(layer, OwnConvolution):
        return replace(member, dim=int(reads), holds=holds)
    if isinstance(layer, TiedLinear):
        holds = layer.also and f"{member.layer.rpartition('.')[0]}.{layer.also}".lstrip(".")
    return replace(member, dim=layer.dims[-1 if reads else -2], holds=holds)


def all_held(model: nn.Module, groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Groups of an evaluation copy, of all whose members that is known."""
    layers = dict(model.named_modules())
    return tuple(replace(group, members=tuple(held(layers.get(member.layer), member) for member in group.members))
                 for group in groups)


def _uncalled(graph: dependencies.Graph, layers: Mapping[str, nn.Module], members: Sequence[Member]
              ) -> Iterator[Member]:
    """Embeddings that never run, but hold the weight of one of `members`, as the one that T5 shares does."""
    weights = {id(layers[member.layer].weight): member for member in members
               if member.role == "producer" and isinstance(layers[member.layer], nn.Embedding)}
    for name, module in layers.items() if weights else ():
        if isinstance(module, nn.Embedding) and module not in graph.module2node and id(module.weight) in weights:
            yield replace(weights[id(module.weight)], layer=name)
