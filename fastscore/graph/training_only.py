"""Auxiliary heads: layers that run in training alone, and read channels as others do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch_pruning as tp
from torch import nn

from fastscore.graph.dependencies import LAYERS
from fastscore.graph.groups import ChannelGraph


def callable_layers(model: nn.Module) -> set[str]:
    """The layers of a model that run when they are called; those within PyTorch's own attention are not."""
    within = {id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
              for part in module.children()}
    return {name for name, module in model.named_modules()
            if tp.ops.module2type(module) in LAYERS and id(module) not in within}


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """In the block, modules of an evaluation copy that hold others take the way that they take in training; BatchNorm
    and dropout stay as they are."""
    containers = [module for module in model.modules() if any(module.children())]
    for module in containers:
        module.training = True
    try:
        yield
    finally:
        for module in containers:
            module.training = False


def drop_unread(graph: ChannelGraph, inactive: set[str]) -> ChannelGraph:
    """The graph less the groups that `inactive` layers alone read: in evaluation mode there is nothing to measure."""
    unread = {group.name: "it is read by layers that run in training alone" for group in graph.groups
              if all(member.layer in inactive for member in group.role("consumer"))}
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in unread),
                   skipped={**graph.skipped, **unread})


def with_skip_reasons(graph: ChannelGraph, inactive: Iterable[str]) -> ChannelGraph:
    """The graph, with a word on each layer that never ran, but for those whose heads an attention reads without calling
    them."""
    known = {member.layer for group in graph.groups if any(group.role("heads")) for member in group.members}
    return replace(graph, skipped={**graph.skipped, **{
        layer: "it does not run on example_inputs: if it reads channels that are removed, it will not fit them"
        for layer in sorted(set(inactive) - known)}})
