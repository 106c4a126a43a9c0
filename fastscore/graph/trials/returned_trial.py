"""The model as prune() would return it, run once before any group is offered.

The trial by surgery (surgery_trial) cuts an evaluation copy, whose attention runs its projections as layers and whose
experts are layers. What is returned is a copy of the user's own model, with its code, hooks and settings: that must run
with fewer channels, too, and as it is trained: a VAE's means alone are read otherwise, and meet its deviations there.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.kept import training_only
from fastscore.graph.trials.row_gradients import likely_numbers
from fastscore.graph.trials.some_channels import some_channels
from fastscore.modules import frames
from fastscore.modules.modes import evaluating
from fastscore.modules.weights.experts import ExpertLinear
from fastscore.wording import said

Run = Callable[[nn.Module], object]


def offered(model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, run: Run, run_as_in_training: Run,
            run_with_cache: Run | None) -> ChannelGraph:
    """The graph of `model`, less the groups without some of whose channels a copy of it does not run.

    Args:
        model: the user's, which stays as it is.
        eval_model: its evaluation copy.
        graph: of it; its groups have been tried on the evaluation copy.
        run: calls a model on the example inputs.
        run_as_in_training: the same, where its code takes the way of training: tried where code asks which that is.
        run_with_cache: the same of a model that users call so, though it is scored without; None of all others.
    """
    refused: dict[str, str] = {}
    # experts take some widths alone, which ranking sees to
    left = [group for group in graph.groups if not any(
        isinstance(eval_model.get_submodule(member.module), ExpertLinear) for member in group.members)]
    ways = [("", run), *([(", in training,", run_as_in_training)] if training_only.code_asks(model) else []),
            *([(", with a cache,", run_with_cache)] if run_with_cache is not None else [])]
    for when, way in ways:
        if not left or not _fault(model, left, way, when, quickly=True) or not _fault(model, left, way, when) or \
                _fault(model, [], way, when):
            continue  # where it fails as it is, no group is to blame
        while left and (why := _fault(model, left, way, when)):
            good, bad = 0, len(left)  # so many of the first groups go well, or fail
            while bad - good > 1:
                middle = (good + bad) // 2
                if found := _fault(model, left[:middle], way, when):
                    bad, why = middle, found
                else:
                    good = middle
            refused[left.pop(bad - 1).name] = why
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in refused),
                   skipped={**graph.skipped, **refused})


def _fault(model: nn.Module, groups: Sequence[ChannelGroup], run: Run, when: str, quickly: bool = False) -> str:
    """What a copy of `model` does without some channels of each of `groups`; nothing where it runs. quickly: with other
    numbers than its layers make, by which code may fail that does not with those."""
    removed = some_channels(groups, 0)
    small: nn.Module = model
    try:
        small = surgery.smaller_copy(model, lambda whole: surgery.remove_channels(whole, groups, removed))
        with torch.no_grad(), evaluating(small), likely_numbers(small) if quickly else nullcontext():
            run(small)
    except Exception as error:  # whatever the model's code does with a width that it does not expect
        return (f"the model that prune() would return does not{when} run with fewer channels there "
                f"({frames.where(small, error.__traceback__)}: {said(error)})")
    return ""
