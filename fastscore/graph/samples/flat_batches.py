"""Batches whose samples lie one after the other in one tensor, each with as many rows as it holds: nodes of graphs,
tokens with cu_seqlens, points of clouds.

Integers in the batch say to the model which rows are which sample's, in whatever way; but a gradient can be sent back
from each row of the output by itself, and what activation and gradient make of all places of a layer's input is that
row's then, wherever they lie. So a sample is a row of the output, where no place of a layer's input reaches two of
them, and there are as many rows whatever the values are, which tells graphs from boxes that a detector finds.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastscore.batches.parts import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.trials.differences import close
from fastscore.graph.trials.sample_trials import Run, Trial, Watched, send_back, tried
from fastscore.modules.sample_axis import SampleAxes, SampleAxis, Untold

_ROWS_ARE = "of which each is a sample, where samples lie one after the other in a batch"
MEETING = "what {0} reads reaches several rows of the output, " + _ROWS_ARE
UNREACHED = "no gradient comes back to {0} from rows of the output, " + _ROWS_ARE
_LARGER = 8  # than it was: a row that is the largest of the batch then
_VALUES = 3  # runs with others than the batch has
_ROWS = 3  # of the batch that are changed, one by one


def find(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch) -> SampleAxes | None:
    """The sample axes of what a model's layers read or make on `example`; None where rows of its output are no samples
    of such a batch.

    model, watched, run: see fastscore.graph.samples.sample_axes.find.
    """
    rows = _rows(example)
    whole = tried(model, watched, run, example, rows)
    if isinstance(whole, str):
        return None
    counts = {len(output) for output in whole.outputs if output.dim()}
    if len(counts) != 1 or not 1 < (samples := counts.pop()) < rows or not _told_by_integers(example, samples):
        return None
    others = _with_other_values(model, watched, run, example)
    trials = [whole, *(trial for trial in others if {len(output) for output in trial.outputs if output.dim()}
                       == {samples})]
    if len(trials) <= len(others) and any(x.is_floating_point() for x in tensors_of(example)):
        return None
    together = _meet(model, run, example, whole)
    for trial in trials:
        trial.size = samples
        send_back(trial, [0 if output.dim() else None for output in trial.outputs])
    found = {layer: tuple(_axis_of(layer, number, trials) for number in range(len(calls)))
             for layer, calls in whole.calls.items()}
    told = any(isinstance(axis, SampleAxis) for axes in found.values() for axis in axes)
    return SampleAxes(found, 0, None, together=together, flat=True) if told else None


def _axis_of(layer: str, number: int, trials: Sequence[Trial]) -> SampleAxis | Untold:
    """What a call of a layer showed in several runs."""
    calls = [trial.calls[layer][number] for trial in trials if len(trial.calls.get(layer, ())) > number]
    touched = [torch.stack(list(call.reached.values())) for call in calls
               if any(bool(came.any()) for came in call.reached.values())]
    if not touched:
        return Untold(UNREACHED.format(layer), False)
    return Untold(MEETING.format(layer)) if any(bool((came.sum(0) > 1).any()) for came in touched) else SampleAxis()


def _rows(example: Batch) -> int:
    """Of the tensor of a batch that has most."""
    return max((len(x) for x in tensors_of(example) if x.dim()), default=0)


def _told_by_integers(example: Batch, samples: int) -> bool:
    """Whether integers in a batch may tell which rows belong together, and its samples do not lie second, [T, N, ...],
    which costs less where it is put right."""
    integers = [x for x in tensors_of(example) if x.dtype in (torch.int32, torch.int64) and x.dim()]
    pairs = [x for x in integers if x.dim() == 2 and len(x) == 2]
    second = [x for x in tensors_of(example) if x.shape[1:2] == (samples,) and
              (x.dim() > 2 or not x.is_floating_point()) and not any(x is edges for edges in pairs)]
    return not second and bool(pairs or any(x.dim() == 1 for x in integers))


def _with_other_values(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch) -> list[Trial]:
    """Runs with values of the example at other places: rows of the output are as many, and what is dead here may be
    alive there. Integers stay, which tell rows apart, but for the first tensor, where it has one for each row."""
    first, rows, trials = first_tensor(example), _rows(example), list[Trial]()
    for seed in range(_VALUES):
        generator = torch.Generator().manual_seed(seed)

        def other(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            if x.numel() < 2 or not (x.is_floating_point() or (x is first and len(x) == rows)):
                return x
            return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(x.shape)

        made = tried(model, watched, run, map_tensors(other, example), len(trials))
        if not isinstance(made, str):
            trials.append(made)
    return trials


def _meet(model: nn.Module, run: Run, example: Batch, whole: Trial) -> bool:
    """Whether another value in one row of the batch changes several rows of the output, by whatever way."""
    for other in _with_one_larger(example):
        made = tried(model, {}, run, other, whole.size, grad=False)
        if isinstance(made, str) or [each.shape for each in made.outputs] != [each.shape for each in whole.outputs]:
            continue
        changed = torch.zeros((), dtype=torch.long)
        for before, after in zip(whole.outputs, made.outputs, strict=True):
            if before.dim():
                same = close(after, before.detach(), rounding=torch.finfo(before.dtype).eps ** 0.5)
                changed = changed + (~same.flatten(1).all(1) if before.dim() > 1 else ~same).long().cpu()
        if int((changed > 0).sum()) > 1:
            return True
    return False


def _with_one_larger(example: Batch) -> Iterator[Batch]:
    """The batch with other values in one row of each floating-point tensor that has as many as the largest of them."""
    rows = max((len(x) for x in tensors_of(example) if x.is_floating_point() and x.dim()), default=0)
    for row in sorted({0, rows // 2, rows - 1})[:_ROWS] if rows else ():
        def larger(x: Tensor, row: int = row) -> Tensor:
            if not x.is_floating_point() or not x.dim() or len(x) != rows:
                return x
            x = x.clone()
            x[row] *= _LARGER
            return x

        yield map_tensors(larger, example)
