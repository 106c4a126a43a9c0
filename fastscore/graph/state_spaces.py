"""The inner width of selective state spaces (Mamba), as transformers holds them: code that reads the weights of its
convolution and of its step sizes itself, or hands them to a kernel, where no layer is called whose channels could be
followed.

A channel is made by two rows of in_proj (what goes on, and its gate), and has its own filter, step size, row of A and
skip; x_proj and out_proj read it. Names suggest that, and whether it is so is then tried as of every group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastscore.graph.groups import TIED, ChannelGraph, ChannelGroup, Member
from fastscore.modules.inspection import parameter_owners, parametrized, shared_parameters

_LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_CONVOLUTION, _TENSORS, _WIDTH = "conv1d", ("A_log", "D"), "intermediate_size"
# of layers whose weights kernels take without a bias that they had not
_NO_BIAS = "is read by its weight alone in the kernels that its module trains with"


def with_widths(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """The graph, and a group for each module that looks like one and whose channels no group has yet, to be tried; in
    the place of groups of some of its layers, which would leave the others as wide as they are.

    model: an evaluation copy.
    """
    def held(group: ChannelGroup) -> set[str]:
        return {member.layer for member in group.members}

    guesses = list(_guesses(model))
    staying = [group for group in graph.groups if not any(held(group) < held(guess) for guess in guesses)]
    made = {member.layer for group in staying for member in group.role("producer")}
    found = [group for group in guesses if made.isdisjoint(member.layer for member in group.role("producer"))]
    return replace(graph, groups=(*staying, *found))


def layers(model: nn.Module) -> set[str]:
    """Of all modules that look like one."""
    return {member.layer for group in _guesses(model) for member in group.members}


def settled(graph: ChannelGraph, biases: Mapping[str, str]) -> ChannelGraph:
    """The graph with no reason to keep what goes with such a group after all, and its `kept_biases`: `biases`, and
    those that such channels meet, which take no means. What was said to go with them and does not, as the steps and
    states that x_proj makes, stays for the reason that was theirs."""
    found = [group for group in graph.groups
             if any(member.layer.rpartition(".")[2] in _TENSORS for member in group.role("tensor"))]
    there = {member.layer for group in found for member in group.members if member.role != "consumer"}
    read = {edge.layer: _NO_BIAS for group in found for edge in group.role("consumer")}
    kept = graph.skipped
    return replace(graph, skipped={
        name: kept[first] if (first := reason.removeprefix(TIED)) in there & kept.keys() else reason
        for name, reason in kept.items() if name not in there},
                   kept_biases={**biases, **read})


def _guesses(model: nn.Module) -> Iterator[ChannelGroup]:
    owners: Mapping[int, int] = parameter_owners(model)
    for name, module in model.named_modules():
        layers = [module._modules.get(key) for key in _LAYERS]
        filters: Any = module._modules.get(_CONVOLUTION)
        if not isinstance(filters, nn.Conv1d) or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        width = filters.out_channels
        into, read, steps, out = (layer for layer in layers if isinstance(layer, nn.Linear))
        held = [module._parameters.get(key) for key in _TENSORS]
        alike = (filters.groups, into.out_features, read.in_features, steps.out_features, out.in_features) == (
            width, 2 * width, width, width, width)
        if not alike or any(tensor is None or len(tensor) != width for tensor in held) or any(
                parametrized(layer) or shared_parameters(layer, owners) for layer in (into, read, steps, out, filters)):
            continue
        every = torch.arange(width)

        def whole(key: str, name: str = name) -> str:
            return f"{name}.{key}".lstrip(".")

        members = [Member(whole("in_proj"), "producer", torch.arange(2 * width), every.repeat(2)),
                   Member(whole("dt_proj"), "producer", every, every),
                   Member(whole(_CONVOLUTION), "channelwise", every, every),
                   *(Member(whole(key), "tensor", every, every, 0) for key in _TENSORS),
                   *(Member(whole(key), "consumer", every, every) for key in ("x_proj", "out_proj"))]
        if vars(module).get(_WIDTH) == width:
            members.append(Member(name, "width", every, every, attribute=_WIDTH))
        yield ChannelGroup(whole("in_proj"), width, every, tuple(members))
