"""Parameters that channels meet in training alone, as the embedding that SpecAugment puts in place of masked frames.

The graph of evaluation mode says nothing of them. Which channels one meets is tried in runs as in training, where each
of its entries is to go with one channel: a run without some of both must read what the whole one reads, and a run
without the channels alone must not. Where that cannot be shown, all channels that it may meet stay.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.kept import training_only
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.graph.trials import surgery_trial, verification
from fastscore.graph.trials.recording import Recording

Run = Callable[[nn.Module], Sequence[Tensor]]


def with_parameters(model: nn.Module, graph: ChannelGraph, run: Run, run_as_in_training: Run) -> ChannelGraph:
    """The graph, whose groups have parameters that they meet in training alone, less those that may meet one, and of
    which that is not shown.

    Args:
        model: that was traced, or a copy of it, whose parameters require gradients.
        graph: its groups, as they are in evaluation mode.
        run, run_as_in_training: call it on the example inputs, and give what it returns.
    """
    if not training_only.code_asks(model):
        return graph
    known = {name for group in graph.groups for member in group.members for name in (member.layer, member.module)
             if member.role != "tensor" or name == member.layer}
    found = {f"{name}.{key}".lstrip("."): parameter for name, module in model.named_modules() if name not in known
             and type_of(module) == OPTYPE.ELEMENTWISE for key, parameter in module._parameters.items()
             if parameter is not None and f"{name}.{key}".lstrip(".") not in known and _dim(parameter) is not None}
    found = {name: parameter for name, parameter in found.items() if _near(graph, name, parameter)}
    if not found:
        return graph
    asked = training_only.asked_for(model)
    read = [_read_in(model, found, way) for way in (run, run_as_in_training)]
    kept: dict[str, str] = {}
    for name, parameter in found.items():
        groups = _near(graph, name, parameter)
        if name in read[1] - read[0] and (met := _meeting(model, groups, name, parameter, run_as_in_training)):
            graph = replace(graph, groups=tuple(met if group.name == met.name else group for group in graph.groups))
        elif name in asked:
            kept |= {group.name: f"the code of {asked[name]} reads its {name.rpartition('.')[2]} "
                                 f"{list(parameter.shape)} in training alone, where channels are not followed"
                     for group in groups}
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in kept),
                   skipped={**graph.skipped, **kept})


def _dim(parameter: Tensor) -> int | None:
    """The dimension of a parameter that all its numbers lie along; None where there is no such one."""
    long = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    return long[0] if len(long) == 1 and parameter.is_floating_point() else None


def _near(graph: ChannelGraph, name: str, parameter: Tensor) -> list[ChannelGroup]:
    """The groups of as many channels as a parameter has numbers, which layers of the module that holds it make."""
    prefix = name[:len(name) - len(name.rpartition(".")[2])]
    return [group for group in graph.groups if group.channels == parameter.numel() and not any(group.role("heads"))
            and all(member.layer.startswith(prefix) for member in group.role("producer"))]


def _read_in(model: nn.Module, parameters: Mapping[str, Tensor], run: Run) -> set[str]:
    """Those whose entries all show in what a run of the model returns; none where it does not run."""
    with suppress(Exception):  # of a model's code that does not train
        rng.seed(0)
        total = torch.stack([output.square().sum().real for output in run(model)]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {name for name, g in zip(parameters, gradients, strict=True) if g is not None and bool(g.ne(0).any())}
    return set()


def _meeting(model: nn.Module, groups: Sequence[ChannelGroup], name: str, parameter: Tensor, run: Run
             ) -> ChannelGroup | None:
    """The group that a parameter is met by in training, with it; None where none is, or several are."""
    def whole(model: nn.Module) -> Tensor:
        rng.seed(0)  # what code draws of numpy, and of Python, too
        return torch.cat([output.flatten() for output in run(model)])

    found: list[ChannelGroup] = []
    with suppress(Exception):  # of code that does not run twice
        recording = Recording(model, whole)
        recording.find_several()
        with recording.record():
            whole(model)
        every = torch.arange(parameter.numel())
        for group in groups:
            more = replace(group, members=(*group.members, Member(name, "tensor", every, every, _dim(parameter) or 0)))
            if not verification.leaks(recording, [more]) and not surgery_trial.refusals(recording, [more]) \
                    and surgery_trial.refusals(recording, [group]):
                found.append(more)
    return found[0] if len(found) == 1 else None
