"""Channel groups: which channels live and die together, and which layers read them.

The graph comes from Torch-Pruning's tracing. What leaves this file is data without a reference to the model: layer
names and index tensors, so that a group found on one copy of a model holds on every other.
"""

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from fastscore import batches
from fastscore.evaluation import evaluation_copy

Role = Literal["producer", "consumer", "channelwise"]
Ignore = Iterable[str | type | nn.Module]

_OPTYPE = tp.ops.OPTYPE
# What a group may pass through, and the part it plays there. A depthwise convolution and a normalisation work on each
# channel alone: they lose the channel, but neither make it nor end it.
_CHANNELWISE = {_OPTYPE.DEPTHWISE_CONV, _OPTYPE.BN, _OPTYPE.GN, _OPTYPE.IN, _OPTYPE.PRELU}
_LAYERS = {_OPTYPE.CONV, _OPTYPE.LINEAR}
_TRANSPARENT = {_OPTYPE.ELEMENTWISE, _OPTYPE.CONCAT, _OPTYPE.SPLIT, _OPTYPE.RESHAPE, _OPTYPE.UNBIND, _OPTYPE.EXPAND,
                _OPTYPE.SLICE}


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one layer.

    layer: qualified module name. role: `producer` (a Conv or Linear that makes the channels), `consumer` (a Conv or
    Linear that reads them) or `channelwise` (a normalisation, PReLU or depthwise convolution between them).
    index, channel: int64 [M]; position `index[m]` of the layer's output (its input, for a consumer) carries the group's
    channel `channel[m]`.
    """

    layer: str
    role: Role
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together.

    name: the first layer that produces them; channels are numbered in its order. unit: int64 [C]; channels with the
    same unit can only be removed together (the same place in every group of a grouped convolution, or channels that
    are added to each other).
    """

    name: str
    channels: int
    unit: Tensor
    members: tuple[Member, ...]

    def role(self, role: Role) -> Iterator[Member]:
        """The members that play `role`."""
        return (member for member in self.members if member.role == role)


@dataclass(frozen=True)
class ChannelGraph:
    """The prunable groups of a model.

    skipped: layer -> why its channels are left alone. normalized_by: Conv or Linear -> the BatchNorm that alone reads
    its output.
    """

    groups: tuple[ChannelGroup, ...]
    skipped: Mapping[str, str]
    normalized_by: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, widths and index maps: equal for models with the same channels in the same places."""
        digest = hashlib.sha256()
        for group in self.groups:
            for member in group.members:
                digest.update(f"{group.name}\0{group.channels}\0{member.layer}\0{member.role}\0".encode())
                digest.update(member.index.numpy().tobytes() + member.channel.numpy().tobytes())
        return digest.hexdigest()

    def without(self, model: nn.Module, ignore: Ignore) -> "ChannelGraph":
        """This graph less the groups that a layer matched by `ignore` produces.

        ignore: qualified names (a name stands for all below it; `*` and `?` are wildcards), module types, modules.
        Raises ValueError for an entry that matches no layer of `model`.
        """
        ignored = _matching_layers(model, ignore)
        skipped, groups = dict(self.skipped), []
        for group in self.groups:
            hit = next((member.layer for member in group.members
                        if member.role != "consumer" and member.layer in ignored), None)
            if hit is None:
                groups.append(group)
            else:
                skipped[group.name] = "ignored" if hit == group.name else f"ignored with {hit}"
        return replace(self, groups=tuple(groups), skipped=skipped)


def trace(model: nn.Module, example_inputs: batches.Batch, forward: batches.Forward = batches.forward) -> ChannelGraph:
    """Find the channel groups of `model` by running `forward(model, example_inputs)` on a copy of it.

    Raises ValueError when the model cannot run on the example inputs, TypeError when it returns no tensor.
    """
    twin = evaluation_copy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # the tracer follows grad_fn
    graph = tp.DependencyGraph()
    has_run = False

    def run(model: nn.Module, batch: batches.Batch) -> Tensor:
        nonlocal has_run
        output = batches.checked(forward)(model, batch)
        has_run = True
        return output

    with torch.enable_grad(), batches.fork_rng(batches.device_of(model)):
        try:
            graph.build_dependency(twin, example_inputs, forward_fn=run, verbose=False)
        except TypeError:
            raise
        except Exception as error:  # the tracer raises whatever its guesses run into
            blame = "Torch-Pruning cannot trace it" if has_run else "it cannot run on example_inputs"
            raise ValueError(f"{type(model).__name__}: {blame}: {type(error).__name__}: {error}") from error
    return _groups(twin, graph)


def _groups(model: nn.Module, graph: Any) -> ChannelGraph:
    groups: list[ChannelGroup] = []
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    tables = _IndexTables()
    for name, module in model.named_modules():
        node = graph.module2node.get(module)
        if node is None or node.type not in _LAYERS or name in seen:
            continue
        places = _places(node, graph.get_pruner_of_module(module), tables)
        members = [member for key in places if (member := _member(graph, key, places[key])) is not None]
        seen.update(member.layer for member in members if member.role == "producer")
        reason = _why_not(model, places, members)
        channels = graph.get_out_channels(module)
        unit = _units(model, channels, members)
        if reason is None and int(unit.max()) == 0:
            reason = "all its channels can only be removed together"
        if reason is None:
            groups.append(ChannelGroup(name, channels, unit, tuple(_first_channel_of_each_index(members))))
        else:
            skipped[name] = reason
    return ChannelGraph(tuple(groups), skipped, _normalized_by(graph))


def _normalized_by(graph: Any) -> dict[str, str]:
    pairs = ((node, node.outputs[0]) for node in graph.module2node.values()
             if node.type in _LAYERS | {_OPTYPE.DEPTHWISE_CONV} and len(node.outputs) == 1)
    return {graph._module2name[layer.module]: graph._module2name[norm.module] for layer, norm in pairs
            if norm.type == _OPTYPE.BN and norm.inputs == [layer]}


class _IndexTables:
    """A dependency's index mapping as an array of (position in the target, position in the source), made once."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, np.ndarray]] = {}  # id(dependency) -> (positions covered, table)

    def apply(self, dependency: Any, places: np.ndarray) -> np.ndarray:
        """[M, 2] (position in the source, channel) -> [M', 2] (position in the target, channel)."""
        mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
        if not mappings:
            return places
        needed = 1 << int(places[:, 0].max()).bit_length()  # in powers of two, not to make a table anew for each width
        covered, table = self._tables.get(id(dependency), (0, np.empty((0, 2), dtype=np.int64)))
        if covered < needed:
            indices = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(needed)]
            for mapping in mappings:
                indices = mapping(indices)
            table = np.array([(i.idx, i.root_idx) for i in indices], dtype=np.int64).reshape(-1, 2)
            table = table[np.argsort(table[:, 1], kind="stable")]
            self._tables[id(dependency)] = needed, table
        begin = np.searchsorted(table[:, 1], places[:, 0], side="left")
        count = np.searchsorted(table[:, 1], places[:, 0], side="right") - begin
        row = np.repeat(begin, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.stack([table[row, 0], np.repeat(places[:, 1], count)], axis=1)


def _places(root: Any, pruner: Any, tables: _IndexTables) -> dict[tuple[Any, Any], np.ndarray]:
    """(node, pruning function) -> [M, 2] (position, channel of the root), for everything the root's channels touch."""
    channels = np.arange(pruner.get_out_channels(root.module))
    places: dict[tuple[Any, Any], np.ndarray] = {}
    work = [(root, pruner.prune_out_channels, np.stack([channels, channels], axis=1))]
    while work:
        node, function, arrived = work.pop()
        known = places.get((node, function))
        merged = np.unique(arrived if known is None else np.concatenate([known, arrived]), axis=0)
        if known is not None and len(merged) == len(known):
            continue
        places[node, function] = merged
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                onward = tables.apply(dependency, merged)
                if len(onward):
                    work.append((dependency.target, dependency.handler, onward))
    return places


def _member(graph: Any, key: tuple[Any, Any], places: np.ndarray) -> Member | None:
    node, function = key
    if node.type in _CHANNELWISE:
        role: Role = "channelwise"
    elif node.type in _LAYERS:
        role = "consumer" if function == graph.get_pruner_of_module(node.module).prune_in_channels else "producer"
    else:
        return None
    index, channel = torch.from_numpy(places).unbind(1)
    return Member(graph._module2name[node.module], role, index.contiguous(), channel.contiguous())


def _why_not(model: nn.Module, places: Iterable[tuple[Any, Any]], members: list[Member]) -> str | None:
    """Why a group cannot be pruned; None where it can."""
    consumers = {member.layer for member in members if member.role == "consumer"}
    for node, function in places:
        if node.type not in _LAYERS | _CHANNELWISE | _TRANSPARENT | {_OPTYPE.OUTPUT}:
            return f"its channels pass through {node.name or type(node.module).__name__} " \
                   f"({type(node.module).__name__}), which cannot lose channels yet"
        reads = node.type in _LAYERS and function.__name__ == "prune_in_channels"
        if node.type == _OPTYPE.OUTPUT or not (node.outputs or reads):
            return "its channels are the model's output"
    if not consumers:
        return "no Conv or Linear reads its channels"
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for member in members:
        layer = model.get_submodule(member.layer)
        if nn.utils.parametrize.is_parametrized(layer) or "weight" in vars(layer):
            return f"the weight of {member.layer} is computed (a parametrization): remove it first"
        if any(owners[id(parameter)] > 1 for parameter in layer._parameters.values() if parameter is not None):
            return f"{member.layer} shares its weight with another layer"
        if _sections(layer, member.role) > 1 and len(member.index) < _width(layer, member.role):
            return f"{member.layer} is grouped and works on other channels too"
    return None


def _units(model: nn.Module, channels: int, members: list[Member]) -> Tensor:
    """The unit of each channel, int64 [C], numbered from 0 in order of first channel: see ChannelGroup."""
    parent = list(range(channels))

    def root(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    def tie(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    for member in members:
        layer = model.get_submodule(member.layer)
        index, channel = member.index.tolist(), member.channel.tolist()
        # A grouped convolution (or norm) keeps its groups equally wide, so the same place in each goes at once.
        sections = _sections(layer, member.role)
        width = _width(layer, member.role) // sections if sections > 1 else 0
        first_at: dict[int, int] = {}
        for position, one in zip(index, channel, strict=True):
            tie(first_at.setdefault(position % width if width else position, one), one)
    roots = [root(channel) for channel in range(channels)]
    number = {value: i for i, value in enumerate(sorted(set(roots)))}
    return torch.tensor([number[value] for value in roots], dtype=torch.int64)


def _sections(layer: nn.Module, role: Role) -> int:
    """Into how many groups of equal width a grouped convolution or norm divides its channels; 1 for other layers."""
    return int(getattr(layer, "num_groups" if role == "channelwise" else "groups", 1))


def _width(layer: nn.Module, role: Role) -> int:
    pruner = tp.function.PrunerBox[tp.ops.module2type(layer)]
    return int(pruner.get_in_channels(layer) if role == "consumer" else pruner.get_out_channels(layer))


def _first_channel_of_each_index(members: list[Member]) -> Iterator[Member]:
    """Members with each position named once: where tied channels meet, the lowest stands for them."""
    for member in members:
        keep = torch.ones_like(member.index, dtype=torch.bool)
        keep[1:] = member.index[1:] != member.index[:-1]  # places are sorted by (index, channel)
        yield Member(member.layer, member.role, member.index[keep], member.channel[keep])


def _matching_layers(model: nn.Module, ignore: Ignore) -> set[str]:
    names = {name: module for name, module in model.named_modules() if name}
    matched: set[str] = set()
    for entry in (ignore,) if isinstance(ignore, (str, type, nn.Module)) else ignore:
        if isinstance(entry, str):
            hits = {name for name in names if fnmatch.fnmatchcase(name, entry)}
        elif isinstance(entry, type):
            hits = {name for name, module in names.items() if isinstance(module, entry)}
        else:
            hits = {name for name, module in names.items() if module is entry}
        if not hits:
            close = difflib.get_close_matches(str(entry), names, n=3)
            raise ValueError(f"ignore: {entry!r} matches no layer of {type(model).__name__}"
                             + (f"; did you mean {', '.join(close)}?" if close else ""))
        matched |= {name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return matched
