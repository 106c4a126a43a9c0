"""The model as prune() would return it, run once before any group is offered.

The trial by surgery (surgery_trial) cuts an evaluation copy, whose attention runs its projections as layers and whose
experts are layers. What is returned is a copy of the user's own model, with its code, hooks and settings: that must run
with fewer channels, too, and as it is trained: a VAE's means alone are read otherwise, and meet its deviations there.
Where the copy runs nothing but the model's own code, by the same settings, that has been run.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import nn

from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.kept import training_only
from fastscore.graph.trials.halving import first_failing
from fastscore.graph.trials.row_gradients import likely_numbers
from fastscore.graph.trials.some_channels import some_channels
from fastscore.modules import frames
from fastscore.modules.copying import is_setting, own_attributes
from fastscore.modules.inspection import LAYERS, hooked
from fastscore.modules.modes import evaluating
from fastscore.modules.weights.experts import ExpertLinear
from fastscore.wording import said

Run = Callable[[nn.Module], object]

# what holds numbers by which the code of others does not go, in a copy as in the model
_LAYERS = (*LAYERS, nn.Embedding, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def offered(model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, run: Run, run_as_in_training: Run,
            run_with_cache: Run | None, tried: Sequence[ChannelGroup] = ()) -> ChannelGraph:
    """The graph of `model`, the user's, less the groups without some of whose channels a copy of it does not run.

    run_as_in_training: as `run`, where the model's code takes the way of training: tried where code asks which that is.
    run_with_cache: of a model that users call so, though it is scored without; None of all others. tried: groups
    without some channels of which, all at once, the evaluation copy did run.
    """
    refused: dict[str, str] = {}
    # experts take some widths alone, which ranking sees to
    left = [group for group in graph.groups if not any(
        isinstance(eval_model.get_submodule(member.module), ExpertLinear) for member in group.members)]
    ways = [*([] if _are_same(left, tried) and _runs_alike(model, eval_model) else [("", run)]),
            *([(", in training,", run_as_in_training)] if training_only.code_asks(model) else []),
            *([(", with a cache,", run_with_cache)] if run_with_cache is not None else [])]
    made: list[nn.Module] = []
    for when, way in ways:
        if not left or not _fault(model, left, way, when, made) or not _fault(model, left, way, when) or \
                _fault(model, [], way, when):
            continue  # where it fails as it is, no group is to blame
        while left and (why := _fault(model, left, way, when)):
            at, why = first_failing(left, why, partial(_fault, model, run=way, when=when))
            refused[left.pop(at).name] = why
            made.clear()
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in refused),
                   skipped={**graph.skipped, **refused})


def _are_same(groups: Sequence[ChannelGroup], tried: Sequence[ChannelGroup]) -> bool:
    """Whether as much goes with them all."""
    known = {group.name: group for group in tried}
    return len(groups) == len(tried) and all(
        (other := known.get(group.name)) is not None and other.unit is group.unit and other.least == group.least
        and len(other.members) == len(group.members) and all(map(is_, other.members, group.members))
        for group in groups)


def _runs_alike(model: nn.Module, eval_model: nn.Module) -> bool:
    """Whether an evaluation copy runs the code of the model's own modules, set as they are, and no more, and none was
    passed by while it was tried (GroupNorms, recurrent layers); parameters and buffers stand in plain layers alone."""
    own, copied = dict(model.named_modules(remove_duplicate=False)), eval_model.named_modules(remove_duplicate=False)
    return all((module := own.pop(name, None)) is not None and type(module) is type(other) and not hooked(module)
               and not isinstance(module, nn.GroupNorm) and "forward" not in vars(other)
               and (type(module) in _LAYERS or not (module._parameters or module._buffers))
               and _settings(module) == _settings(other) is not None for name, other in copied) and not own


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """What a module's code may go by, beside tensors and modules; None where that cannot be compared."""
    held = own_attributes(module)
    return held if all(map(is_setting, held.values())) else None


def _fault(model: nn.Module, groups: Sequence[ChannelGroup], run: Run, when: str, made: list[nn.Module] | None = None
           ) -> str:
    """What a copy of `model` does without some channels of each of `groups`; nothing where it runs. made: where that
    copy is kept, for the next way to run it, as it was before; to be quick, with other numbers than its layers make, by
    which code may fail that does not with those."""
    small: nn.Module = model
    try:
        if made:
            (small,) = made
        else:
            removed = some_channels(groups, 0)
            small = surgery.smaller_copy(model, lambda whole: surgery.remove_channels(whole, groups, removed))
            if made is not None:
                made.append(small)
        with torch.no_grad(), evaluating(small), nullcontext() if made is None else likely_numbers(small):
            run(small)
    except Exception as error:  # whatever the model's code does with a width that it does not expect
        return (f"the model that prune() would return does not{when} run with fewer channels there "
                f"({frames.where(small, error.__traceback__)}: {said(error)})")
    return ""
