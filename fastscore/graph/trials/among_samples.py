"""What channels do to other samples of a batch, of which a run on one sample shows nothing: the model's code chooses
some of the samples by them, or an order, or computes a number of all samples that is none of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastscore.batches.parts import Batch, can_be_cut, first_tensor
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.kept import reasons
from fastscore.graph.trials import verification
from fastscore.graph.trials.recording import Recording
from fastscore.graph.trials.sample_trials import Run
from fastscore.graph.trials.trial_inputs import batch_of

_FEWEST, _MOST = 4, 16  # samples of the batch that is tried: code that leaves out all but a number may take few whole


def refusals(model: nn.Module, run: Run, groups: Sequence[ChannelGroup], example: Batch, samples: Batch
             ) -> dict[str, str]:
    """Name of a group that was verified on one sample -> why its channels are kept, as a run on several shows it; empty
    where it was traced with several, or does not run on them, or not twice in the same way.

    run: (model, batch) -> its floating-point outputs. example: the batch that it was traced with. samples: of which the
    batch is made that is tried.
    """
    if _count(example) != 1 or not can_be_cut(samples):
        return {}
    mixed, chosen = _shown(model, run, groups, batch_of(samples, tried(samples)))
    if mixed or chosen:  # what shows on one sample, too, is known, and allowed for elsewhere
        for known in _shown(model, run, [group for group in groups if group.name in mixed | chosen], example):
            mixed, chosen = ({name: found[name] for name in found.keys() - known.keys()} for found in (mixed, chosen))
    return {name: reasons.among_samples(where, found is chosen)
            for found in (mixed, chosen) for name, where in found.items()}


def tried(samples: Batch) -> int:
    """Of how many samples the batch is that is tried."""
    return min(max(_count(samples), _FEWEST), _MOST)


def _count(batch: Batch) -> int:
    return first.shape[:1].numel() if (first := first_tensor(batch)) is not None else 0


def _shown(model: nn.Module, run: Run, groups: Sequence[ChannelGroup], batch: Batch) -> tuple[dict[str, str], ...]:
    """(where channels show that are not known to come there, whatever is chosen; where, because something is)."""
    def whole(model: nn.Module) -> Tensor:
        return torch.cat([output.flatten() for output in run(model, batch)])

    recording = Recording(model, whole)
    recording.forget_norms(but={member.layer for group in groups for member in group.role("norm", "channelwise")})
    try:
        with torch.no_grad(), recording.record():
            whole(model)
        if recording.leak({}, {}) is not None:
            return {}, {}
    except Exception:  # of the model's code, or forward=
        return {}, {}
    mixed = {group.name: layer for group in groups for member in group.members if (layer := member.layer)
             in recording.layers.keys() - recording.layers_that_ran}
    mixed |= verification.leaks(recording, [group for group in groups if group.name not in mixed], held=True)
    return mixed, verification.leaks(recording, [group for group in groups if group.name not in mixed], chosen=True)
