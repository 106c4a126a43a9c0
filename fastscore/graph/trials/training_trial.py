"""Parameters that channels meet in training alone, as the embedding that SpecAugment puts in place of masked frames.

The graph of evaluation mode says nothing of them. Which channels one meets is tried in runs as in training, where each
of its entries is to go with one channel: a run without some of both must read what the whole one reads, and a run
without the channels alone must not. Where that cannot be shown, all channels that it may meet stay.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.kept import training_only
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.graph.trials import surgery_trial, verification
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.draws import SteadyDraws
from fastscore.graph.trials.recording import Recording
from fastscore.modules.inspection import held_in

Run = Callable[[nn.Module], Sequence[Tensor]]


def takes_same_way(recording: Recording, run: Callable[[nn.Module, bool], Sequence[Tensor]]) -> bool:
    """Whether a model does in training what it does in evaluation mode: calls the same layers, on the same numbers, and
    returns the same, where layers give what they gave.

    recording: of a run of it. run(model, trained): all that it returns.
    """
    found = []
    for trained in (False, True):
        count, read = list[int](), list[tuple[str, Tensor | None]]()

        def whole(model: nn.Module, trained: bool = trained, count: list[int] = count) -> Tensor:
            outputs = run(model, trained)
            count.extend(output.numel() for output in outputs)
            return torch.cat([output.flatten() for output in outputs])

        def see(layer: str, call: int, x: Tensor | None, read: list[tuple[str, Tensor | None]] = read) -> None:
            read.append((layer, None if x is None else x.clone()))

        output = recording.run_again(recording.model, whole, see)
        found.append((count, output, read))
    (count, output, read), (other_count, other, other_read) = found
    return count == other_count and _alike(output, other) and [layer for layer, _ in read] == [
        layer for layer, _ in other_read] and all(_alike(x, y) for (_, x), (_, y) in zip(read, other_read, strict=True))


def _alike(x: Tensor | None, other: Tensor | None) -> bool:
    if x is None or other is None:
        return x is other
    return all_close(x, other)


def with_parameters(recording: Recording, graph: ChannelGraph, *runs_as_in_training: Run) -> ChannelGraph:
    """The graph of evaluation mode, in which `recording` ran, whose groups have parameters that they meet in training
    alone, less those that may meet one, and of which that is not shown: parameters are tried in the first of the runs
    that runs."""
    model = recording.model
    if not training_only.code_asks(model):
        return graph
    known = {name for group in graph.groups for member in group.members for name in (member.layer, member.module)
             if member.role != "tensor" or name == member.layer}
    found = {f"{name}.{key}".lstrip("."): parameter for name, module in model.named_modules() if name not in known
             and type_of(module) == OPTYPE.ELEMENTWISE for key, parameter in module._parameters.items()
             if parameter is not None and f"{name}.{key}".lstrip(".") not in known and long_dim(parameter) is not None}
    found = {name: parameter for name, parameter in found.items() if _near(graph, name, parameter)}
    if not found:
        return graph
    asked = training_only.asked_for(model)
    in_training = next(filter(None, (_recorded(model, run) for run in runs_as_in_training)), None)
    read = [{name for name, parameter in found.items() if each is not None and shows(each, name, parameter)}
            for each in (recording, in_training)]
    kept: dict[str, str] = {}
    for name, parameter in found.items():
        groups = _near(graph, name, parameter)
        if in_training is not None and name in read[1] - read[0] and (
                met := _meeting(in_training, groups, name, parameter)):
            graph = replace(graph, groups=tuple(met if group.name == met.name else group for group in graph.groups))
        elif name in asked:
            kept |= {group.name: f"the code of {asked[name]} reads its {name.rpartition('.')[2]} "
                                 f"{list(parameter.shape)} in training alone, where channels are not followed"
                     for group in groups}
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in kept),
                   skipped={**graph.skipped, **kept})


def long_dim(parameter: Tensor) -> int | None:
    """The dimension of a parameter that all its numbers lie along; None where there is no such one."""
    long = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    return long[0] if len(long) == 1 and parameter.is_floating_point() else None


def _near(graph: ChannelGraph, name: str, parameter: Tensor) -> list[ChannelGroup]:
    """The groups of as many channels as a parameter has numbers, which layers of the module that holds it make, or add
    to."""
    prefix = name[:len(name) - len(name.rpartition(".")[2])]
    return [group for group in graph.groups if group.channels == parameter.numel() and not any(group.role("heads"))
            and any(member.layer.startswith(prefix) for member in group.role("producer"))]


def _recorded(model: nn.Module, run: Run) -> Recording | None:
    """A recording of a run of a model; None where it does not run."""
    def whole(model: nn.Module) -> Tensor:
        rng.seed(0)  # what code draws of numpy, and of Python, too
        with SteadyDraws():  # in all runs the same layers, of code that leaves some out at random
            return torch.cat([output.flatten() for output in run(model)])

    with suppress(Exception):  # of a model's code that does not train
        recording = Recording(model, whole)
        with recording.record():
            whole(model)
        return recording
    return None


def shows(recording: Recording, name: str, parameter: Tensor) -> bool:
    """Whether the entries of a parameter show in what a model's layers read, or in what it returns."""
    assert recording.inputs is not None  # of the model as it is, before anything is changed
    every = torch.arange(parameter.numel())
    other = verification.another(parameter)
    with verification.entries_changed([(*held_in(recording.model, name), other, long_dim(parameter) or 0, every)]):
        return recording.leak({}, {}) is not None


def _meeting(recording: Recording, groups: Sequence[ChannelGroup], name: str, parameter: Tensor
             ) -> ChannelGroup | None:
    """The group that a parameter is met by in training, with it; None where none is, or several are."""
    found: list[ChannelGroup] = []
    with suppress(Exception):  # of code that does not run twice
        every = torch.arange(parameter.numel())
        for group in groups:
            member = Member(name, "tensor", every, every, long_dim(parameter) or 0)
            more = replace(group, members=(*group.members, member))
            if not verification.leaks(recording, [more]) and not surgery_trial.refusals(recording, [more]) \
                    and surgery_trial.refusals(recording, [group]):
                found.append(more)
    return found[0] if len(found) == 1 else None
