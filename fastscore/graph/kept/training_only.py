"""Auxiliary heads: layers that run in training alone, and read channels as others do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import nn

from fastscore.graph.following.cuts import LAYERS
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.layer_types import type_of
from fastscore.modules.hooks import put_on
from fastscore.modules.reachable_code import ReachableCode, functions_in
from fastscore.modules.settled_branches import never_reads


def callable_layers(model: nn.Module) -> set[str]:
    """The layers of a model that run when they are called; those within PyTorch's own attention are not."""
    within = {id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
              for part in module.children()}
    return {name for name, module in model.named_modules()
            if type_of(module) in LAYERS and id(module) not in within}


@contextmanager
def as_in_training(model: nn.Module, trained: bool = True) -> Iterator[list[Any]]:
    """In the block, modules of an evaluation copy that hold others take the way that they take in training; BatchNorm
    and dropout stay as they are. Gives a list that what the model returns there is added to. trained: or not, but for
    the list."""
    containers = [module for module in model.modules() if any(module.children())]
    returned: list[Any] = []
    for module in containers:
        module.training = trained
    try:
        with put_on([model.register_forward_hook(lambda module, args, output: returned.append(output))]):
            yield returned
    finally:
        for module in containers:
            module.training = False


def merge(graph: ChannelGraph, in_training: ChannelGraph, inactive: set[str]) -> ChannelGraph:
    """The groups of evaluation mode, `graph`, which layers that run in training alone, `inactive`, read as well.

    What the other lacks, or has otherwise, is taken from `graph`, and there is no group that it does not have: where
    inactive layers alone read one, there is nothing to measure.
    """
    more = {group.name: group for group in in_training.groups}
    unread = {name: "it is read by layers that run in training alone" for name, group in more.items()
              if all(member.layer in inactive for member in group.role("consumer"))}
    groups = tuple(more[group.name] if group.name in more and _extends(more[group.name], group) else group
                   for group in graph.groups)
    there = {group.name for group in groups}
    skipped = {**graph.skipped, **{name: why for name, why in in_training.skipped.items()
                                   if name in inactive or name not in graph.skipped}, **unread}
    return replace(graph, groups=groups, skipped={name: why for name, why in skipped.items() if name not in there},
                   training_only=frozenset(inactive), kept_biases={**in_training.kept_biases, **graph.kept_biases})


def asked_for(model: nn.Module) -> dict[str, str]:
    """Parameters of one dimension that code reads which asks whether it is trained -> the class whose code that is."""
    changes = ReachableCode(model).changes
    return {f"{name}.{key}" if name else key: type(module).__name__ for name, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 1 and any(
                not never_reads(function, module, key, changes) for function in _asking(type(module), key))}


def code_asks(model: nn.Module) -> bool:
    """Whether the code of a module that holds others asks whether it is trained."""
    return any(True for module in model.modules() if any(module.children()) for _ in _asking(type(module)))


def _asking(kind: type[nn.Module], *names: str) -> Iterator[FunctionType]:
    """Methods of a class whose code reads `names`, and whether it is trained."""
    return (function for cls in kind.__mro__ if cls is not nn.Module for value in vars(cls).values()
            for function in functions_in(value) if {*names, "training"} <= set(function.__code__.co_names))


def _extends(group: ChannelGroup, other: ChannelGroup) -> bool:
    """Whether a group has all that another has, and perhaps more readers."""
    roles = {(member.layer, member.role) for member in group.members}
    return group.channels == other.channels and roles >= {(member.layer, member.role) for member in other.members}


def with_skip_reasons(graph: ChannelGraph, inactive: Iterable[str]) -> ChannelGraph:
    """The graph, with a word on each layer that never ran, but for those whose heads an attention reads without calling
    them, and those that lose with their siblings what they make."""
    known = {member.layer for group in graph.groups if any(group.role("heads")) for member in group.members}
    known |= {member.layer for group in graph.groups for member in group.role("producer")} & graph.chosen
    fit = {member.layer for group in graph.groups for member in group.members} & graph.chosen
    return replace(graph, skipped={**graph.skipped, **{
        layer: "nothing in example_inputs chooses it, as the experts beside it: what it makes is not measured"
        if layer in fit else
        "it does not run on example_inputs: if it reads channels that are removed, it will not fit them"
        for layer in sorted(set(inactive) - known)}})
