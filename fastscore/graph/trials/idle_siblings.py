"""Experts that nothing in the example chooses: modules that do not run, beside others of the same class and shapes
that do. Another batch may choose them, so that they are to lose the channels that their siblings read and make; each is
tried by itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member, Role
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.recording import Recording
from fastscore.graph.trials.some_channels import some_channels
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import channel_dim
from fastscore.modules.narrower import without

_BY_ITSELF: set[Role] = {"producer", "consumer", "channelwise", "norm", "tensor", "width"}  # whatever others do
_Members: TypeAlias = dict[str, list[Member]]  # by the groups that they are of


def with_siblings(recording: Recording, graph: ChannelGraph) -> ChannelGraph:
    """The graph of the recorded model, whose groups have the layers of such modules, too."""
    chosen = list(_chosen(recording))
    graph = replace(graph, chosen=frozenset(layer for running, idle in chosen for name in (*running, *idle)
                                            for layer in _layers(recording, name)))
    alike = {name: running for running, idle in chosen for name in idle}
    more = {name: members for name, others in alike.items() if (members := _of_each(graph.groups, name, others))}
    if not more:
        return graph
    gone = [surgery.removed_indices(groups, some_channels(groups, part))
            for groups in [_with(graph.groups, more)] for part in (0, 1)]
    try:
        tried = [(each, surgery.remove_indices(evaluation_copy(recording.model), each)) for each in gone]
    except Exception:  # of a module that keeps no such numbers as the others
        return graph
    more = {name: members for name, members in more.items()
            if all(_computes_the_rest(recording, small, each, name, members, alike[name]) for each, small in tried)}
    groups = _with(graph.groups, more)
    covered = {member.layer for members in more.values() for each in members.values() for member in each
               if member.role == "producer"}
    biases = {f"{name}{layer.removeprefix(alike[name][0])}": why for name in more
              for layer, why in graph.kept_biases.items() if f"{layer}.".startswith(f"{alike[name][0]}.")}
    return replace(graph, groups=groups, kept_biases={**graph.kept_biases, **biases},
                   skipped={layer: why for layer, why in graph.skipped.items() if layer not in covered})


def _chosen(recording: Recording) -> Iterator[tuple[list[str], list[str]]]:
    """(modules that run, those that do not) of each set that are alike, of which code chooses for each row: some do not
    run, or they read other numbers of rows."""
    ran = recording.layers_that_ran
    for path, container in recording.model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.ModuleDict):
            continue
        alike = defaultdict[Any, list[str]](list)
        for key, child in container._modules.items():
            if child is not None:
                alike[_kind(child)].append(f"{path}.{key}".lstrip("."))
        for names in alike.values():
            layers = {name: _layers(recording, name) for name in names if len(names) > 1}
            running = [name for name in layers if layers[name] & ran]
            idle = [name for name in layers if layers[name] and not layers[name] & ran]
            read = [{layer[len(name):]: [x.shape for x in recording.inputs[layer] if x is not None]
                     for layer in sorted(layers[name] & recording.inputs.keys())} for name in running]
            if running and (idle or any(each != read[0] for each in read)):
                yield running, idle


def _kind(module: nn.Module) -> Any:
    return type(module), tuple((name, tensor.shape) for name, tensor in (*module.named_parameters(),
                                                                         *module.named_buffers()))


def _layers(recording: Recording, name: str) -> set[str]:
    """The layers of a module."""
    inside = recording.model.get_submodule(name).named_modules()
    return {layer for part, _ in inside if (layer := f"{name}.{part}".rstrip(".")) in recording.layers}


def _of_each(groups: Sequence[ChannelGroup], name: str, others: Sequence[str]) -> _Members:
    """The members that a module has, as all `others` have them; of groups that no other has to itself."""
    found: _Members = {}
    for group in groups:
        parts = [_inside(group, other) for other in others]
        if not parts[0] or len(parts[0]) == len(group.members) or any(not _same(parts[0], part) for part in parts):
            continue
        if not {member.role for member in parts[0].values()} <= _BY_ITSELF:
            return {}
        begin = len(others[0])
        found[group.name] = [replace(member, layer=f"{name}{member.layer[begin:]}", holds=(
            f"{name}{member.holds[begin:]}" if member.holds and member.holds.startswith(f"{others[0]}.")
            else member.holds)) for member in parts[0].values()]
    return found


def _inside(group: ChannelGroup, name: str) -> dict[tuple[Any, ...], Member]:
    """The members of a group in a module, by where they are there."""
    return {(member.layer[len(name):], member.role, member.dim, member.attribute): member for member in group.members
            if f"{member.layer}.".startswith(f"{name}.")}


def _same(one: Mapping[tuple[Any, ...], Member], other: Mapping[tuple[Any, ...], Member]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(member.index, other[key].index) and torch.equal(member.channel, other[key].channel)
        for key, member in one.items())


def _with(groups: Sequence[ChannelGroup], more: Mapping[str, _Members]) -> tuple[ChannelGroup, ...]:
    return tuple(replace(group, members=(*group.members, *(
        member for members in more.values() for member in members.get(group.name, ())))) for group in groups)


def _computes_the_rest(recording: Recording, small: nn.Module, gone: surgery.RemovedIndices, name: str,
                       members: _Members, others: Sequence[str]) -> bool:
    """Whether a module makes, without what is gone, of the rest of what it reads what it makes with zeros there."""
    read, made = (next((member.layer for each in members.values() for member in each if member.role == role), None)
                  for role in ("consumer", "producer"))
    if read is None:
        return False
    x = next((x for other in others for x in recording.inputs.get(f"{other}{read[len(name):]}", ())
              if x is not None and x.numel()), None)
    whole = recording.model.get_submodule(name)
    if x is None:
        return False
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with suppress(Exception), torch.no_grad():  # of what is called on more than that
        dim = channel_dim(whole.get_submodule(read[len(name) + 1:]))
        lost = gone.get((read, "inputs"), torch.zeros(0, dtype=torch.int64))
        expected: Tensor = whole(x.index_fill(dim, lost.to(x.device), 0))
        if made is not None and (made, "outputs") in gone:
            expected = without(expected, channel_dim(whole.get_submodule(made[len(name) + 1:])), gone[made, "outputs"])
        output: Tensor = small.get_submodule(name)(without(x, dim, lost))
        return all_close(output, expected, rounding=torch.finfo(x.dtype).eps ** (1 / 2))
    return False
