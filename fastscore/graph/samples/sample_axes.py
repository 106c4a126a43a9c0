"""Which rows of a layer's input belong to which sample: found by sending a gradient back from one sample at a time.

A row that the gradient of sample n's output reaches, and no other sample's, is a row of sample n: what activation and
gradient make of it counts for that sample and no other. So the model runs on a few samples, once for each of two batch
sizes: a dimension counts samples only if it grows with them (T = N proves nothing), and only in the order in which
gradients come back. Rows that a model's code routes by what they hold must lie so whatever it decides (see
fastscore.graph.routing). The layout that is left is the one for batches of any size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.parts import Batch, can_be_cut, first_tensor, map_tensors
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.routing import Decisions
from fastscore.graph.samples import flat_batches
from fastscore.graph.trials import companions
from fastscore.graph.trials.known_samples import KnownSamples
from fastscore.graph.trials.sample_trials import Call, Run, Trial, Watched, send_back, trial, tried
from fastscore.graph.trials.trial_inputs import batch_of, hold_other_values, otherwise, randomize_zeros
from fastscore.modules.inspection import channel_dim, device_of
from fastscore.modules.sample_axis import EVERY, MIXED, SampleAxes, SampleAxis, Untold, joined_axis

_SIZES = (2, 3, 4, 5, 7)  # of batches: the first two as a rule, the others where those leave a choice
_QUICK = (1, 2)  # of an example of one sample, which is run once for other ends
_DECISIONS = 2  # runs in which the model's code decides otherwise about what a batch holds
Around = Callable[[], AbstractContextManager[Any]]

SHARED = "what {0} reads is shared by several samples, whose gradients there cannot be told apart"
_UNTOLD = "it cannot be told which of the rows that {0} reads belong to which sample: "
IRREGULAR = _UNTOLD + "the model's code routes, gathers, flips or loops over them"
UNREACHED = _UNTOLD + "no sample that was tried sends a gradient back to it"
UNTOUCHED = UNREACHED + ", and there are as many for any number of samples"
AMBIGUOUS = _UNTOLD + "the gradients that come back fit more than one order"
_MOVING = (IRREGULAR, AMBIGUOUS, UNREACHED, UNTOUCHED)  # as far as was seen, each row is of one sample
_UNSURE = (IRREGULAR, AMBIGUOUS)  # may be otherwise with other sizes, or the gradients of the layers
VARYING = ", as many numbers as it finds"  # of an output whose size is no multiple of the number of samples
ALONE = ": it is scored where batches have one sample each"


def of_graph(model: nn.Module, graph: ChannelGraph, run: Run, run_as_in_training: Run, example: Batch,
             single: Batch = None, first: Around = nullcontext, pair: Around = nullcontext,
             norms: bool = False) -> SampleAxes:
    """The sample axes of what is tapped: the inputs of consumers, and the outputs of BatchNorms where `norms` are to be
    scored. See `find`.

    run_as_in_training: for layers that `run` does not call.
    """
    watched = {edge.layer: Watched(channel_dim(model.get_submodule(edge.layer)))
               for group in (*graph.groups, *graph.experts) for edge in group.edges}
    watched |= {edge.tap: Watched(edge.dim, True, edge.layer) for group in graph.blocks for edge in group.edges}
    watched |= {edge.tap: Watched(-1, edge.role == "query", edge.layer) for group in graph.head_dims
                for edge in group.edges}
    watched |= {name: Watched(1, output=True) for name, module in model.named_modules()
                if norms and isinstance(module, nn.modules.batchnorm._BatchNorm)}
    axes = find(model, watched, run, example, single, first, pair) if watched else SampleAxes()
    inactive = {layer: watched[layer] for layer in watched.keys() - axes.calls.keys() - graph.chosen}
    if not inactive:
        return axes
    return replace(axes, calls={**axes.calls, **find(model, inactive, run_as_in_training, example, single).calls})


def find(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch, single: Batch = None,
         first: Around = nullcontext, pair: Around = nullcontext) -> SampleAxes:
    """The sample axes of what those layers of a model that ran read or make; every reason says why a layer's samples
    cannot be told apart.

    model: an evaluation copy that nobody else uses; parameters that are zero, which let no gradient pass, become
    random. run: (model, batch) -> its floating-point outputs. example: samples of it make up the batches that are
    tried. single: a batch that may be of a single sample. first: a run on a single sample, without gradients, is made
    in this block. pair: one on `single` in this, where that is `example`, of as many samples as are tried first.
    """
    model.requires_grad_(False)
    randomize_zeros(model)
    known = KnownSamples(model)
    quick = _Way(_QUICK, False, known, first, single)
    found = _find(model, watched, run, example, quick) if _samples_of(single) == 1 else None
    first = pair if example is single and _samples_of(example) == _SIZES[0] else nullcontext
    return found or _find(model, watched, run, example, _Way(_SIZES, True, known, first)) or SampleAxes()


@dataclass(frozen=True)
class _Way:
    """How samples are told apart: on batches of which sizes, with the gradients that layers send back or with others
    that reach the same rows (which may grow too large, or too small); what is known of samples; and in which block the
    first run is made, on which batch."""

    sizes: Sequence[int]
    exact: bool
    known: KnownSamples
    first: Around = nullcontext
    single: Batch = None

    def batch(self, example: Batch, size: int) -> Batch:
        """So many samples made of the example's; the second batch of the quick way shows whether they depend on each
        other, too."""
        made = batch_of(example, size)
        return made if self.exact else companions.beside_larger(made, example)


def _find(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch, way: _Way) -> SampleAxes | None:
    """What one way shows; None where another may show more."""
    trials = _shapes_at_two_sizes(model, watched, run, example, way)
    if isinstance(trials, str):
        return SampleAxes(dict.fromkeys(watched, (Untold(trials),))) if way.exact else None
    axes = [joined_axis([trial.outputs[place].shape for trial in trials], [trial.size for trial in trials])
            for place in range(min(len(trial.outputs) for trial in trials))]
    if len(trials) == 1 and not can_be_cut(example):  # as many classes as nodes, say
        axes = [axis if axis == 0 else None for axis in axes]
    called_with = [trial.called_with for trial in trials if trial.called_with is not None]
    inputs = joined_axis([tensor.shape for tensor in called_with], [trial.size for trial in trials]) \
        if len(called_with) == len(trials) else None
    values = called_with[-1].numel() // trials[-1].size if inputs is not None else 0
    if None in axes or not axes:
        shown = " and ".join(f"{', '.join(str(list(output.shape)) for output in trial.outputs)} for {trial.size}"
                             for trial in trials)
        reason = "which dimension of the output counts samples cannot be told: with samples along the first " \
            f"dimension of the batch, it is {shown} of them"
        if not way.exact:
            return None
        if (flat := flat_batches.find(model, watched, run, example)) is not None:
            alone = {layer: tuple(replace(axis, reason=axis.reason + ALONE) if isinstance(axis, Untold) else axis
                                  for axis in calls) for layer, calls in flat.calls.items()}
            return replace(flat, calls=alone)
        if all(output.dim() and len(output) == 1 for trial in trials for output in trial.outputs):
            return SampleAxes({layer: (Untold(IRREGULAR.format(layer) + ALONE),) for layer in watched}, 0, None,
                              one=True)
        others = [tried(model, watched, run, batch_of(example, size), size, False) for size in _SIZES[2:]]
        if _varies([*trials, *(other for other in others if isinstance(other, Trial))]):
            reason += VARYING
        return SampleAxes(dict.fromkeys(watched, (Untold(reason),)), 0, inputs, values)
    batch = way.batch(example, trials[-1].size) if len(trials) > 1 else example
    otherwise = _decided_otherwise(model, watched, run, batch, trials[-1], axes, way)
    together = companions.depend(model, run, trials, batch, example, axes, way.known, way.single)
    second = not companions.is_alone_what_it_was(trials, batch, example, axes, way.single) and \
        _second_dimension(model, run, batch, trials[-1].outputs[0])
    shapes = [output.shape for output in trials[-1].outputs]
    send_back(trials[-1], axes)
    found = _resolve([*otherwise, *trials])
    seen = [trials[-1]]
    if not way.exact and _any(found, (UNREACHED,)):  # a rectifier may pass nothing of these
        beside = tried(model, watched, run, companions.others(example), 2, exact=False, values=False)
        if isinstance(beside, str) or [output.shape for output in beside.outputs] != shapes:
            return None
        send_back(beside, axes)
        seen.append(beside)
        found = _resolve([*otherwise, *seen[1:], *trials])
    if not way.exact and (_any(found, _UNSURE) or (_any(found, (UNREACHED,)) and any(
            call.overflowed for each in seen for calls in each.calls.values() for call in calls))):
        return None
    for size in way.sizes[2:] if len(trials) > 1 else ():
        if not _any(found, (AMBIGUOUS,)):
            break
        more = tried(model, watched, run, batch_of(example, size), size)
        if not isinstance(more, str):
            send_back(more, axes)
            trials.append(more)
            found = _resolve([*otherwise, *trials])
    every = [*otherwise, *seen[1:], *trials]
    calls = {layer: tuple(axis if isinstance(axis, SampleAxis) else
                          Untold(axis.format(layer) + ALONE, axis != UNREACHED,
                                 _moving(every, layer, number) if axis in _MOVING else None)
                          for number, axis in enumerate(of_layer)) for layer, of_layer in found.items()}
    return SampleAxes(calls, axes[0] or 0, inputs, values, second, together=together)


def _any(found: Mapping[str, Sequence[SampleAxis | str]], reasons: Collection[str]) -> bool:
    """Whether one of `reasons` stands in some layer's way."""
    return any(axis in reasons for of_layer in found.values() for axis in of_layer)


def _varies(trials: Sequence[Trial]) -> bool:
    """Whether outputs have sizes that say nothing of how many samples there are."""
    sizes = zip(*([size for output in trial.outputs for size in output.shape] for trial in trials), strict=False)
    samples = [trial.size for trial in trials]
    return any(0 in each or (len(set(each)) > 1 and len({size / n for size, n in zip(each, samples, strict=True)}) > 1)
               for each in sizes)


def _second_dimension(model: nn.Module, run: Run, batch: Batch, output: Tensor) -> bool:
    """Whether places along the second dimension of a batch, and of the output, do not see each other, and those along
    the first do: a batch [T, N, ...], where [N, ...] is meant."""
    tensor = first_tensor(batch)
    if tensor is None or min(tensor.dim(), output.dim()) < 3 or tensor.shape[:2] != output.shape[:2] \
            or tensor.shape[1] < 2:
        return False

    def others_change(dim: int) -> bool:
        def replace_first(x: Tensor) -> Tensor:
            if x.dim() <= dim or x.shape[:2] != tensor.shape[:2]:
                return x
            return torch.cat([x.narrow(dim, 1, 1), x.narrow(dim, 1, x.shape[dim] - 1)], dim)

        rng.start_over(device_of(model))
        with torch.no_grad():
            (changed, *_) = run(model, map_tensors(replace_first, batch))
        left = output.shape[dim] - 1
        before, after = (each.detach().narrow(dim, 1, left).nan_to_num() for each in (output, changed))
        rounding: float = torch.finfo(before.dtype).eps ** 0.5
        return float((after - before).abs().max()) > rounding * float(before.abs().max())

    return others_change(0) and not others_change(1)


def _shapes_at_two_sizes(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch, way: _Way
                         ) -> list[Trial] | str:
    """Two runs, the second with a graph; or one, on the example as it is, where the model takes no other size."""
    small, large = way.sizes[:2]
    batch = batch_of(example, small) if way.exact else way.single
    try:
        with way.first():
            first: Trial | str = trial(model, watched, run, batch, small, grad=False, known=way.known)
    except Exception:  # of the model's code; or of the block
        first = tried(model, watched, run, batch, small, grad=False)
    batch = way.batch(example, large)
    with Decisions(batch) as noted:
        second = tried(model, watched, run, batch, large, exact=way.exact, known=way.known)
    if isinstance(second, str):  # it may be the looking for decisions that does not run
        second = tried(model, watched, run, batch, large, exact=way.exact, known=way.known)
    else:
        second.note(noted)
    if not isinstance(first, str) and not isinstance(second, str):
        return [first, second]
    if not way.exact:
        return "no run on other sizes"
    count = _samples_of(example)
    as_it_is = tried(model, watched, run, example, count) if count > 1 else ""
    if not isinstance(as_it_is, str):
        return [as_it_is]
    return (as_it_is or (first if isinstance(first, str) else str(second))) + ALONE


def _samples_of(example: Batch) -> int:
    tensor = first_tensor(example)
    return len(tensor) if tensor is not None and tensor.dim() else 0


def _decided_otherwise(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, known: Trial,
                       axes: Sequence[int | None], way: _Way) -> list[Trial]:
    """Runs like the known one, on its batch, in which the model's code decides otherwise about what the batch holds, or
    is given other lengths, tokens and masks; none where that changes nothing, or it does not run then."""
    shapes = [output.shape for output in known.outputs]
    if known.decides is None:
        with Decisions(batch) as noted:
            tried(model, watched, run, batch, known.size, grad=False)
        known.note(noted)
    trials = []
    for others, seed in otherwise(batch, _DECISIONS, bool(known.decides), known.picks):
        for other in others:
            if not known.decides and not hold_other_values(batch, other):
                continue
            with Decisions(other, seed):
                more = tried(model, watched, run, other, known.size, exact=way.exact, values=False)
            if not isinstance(more, str) and [output.shape for output in more.outputs] == shapes:
                send_back(more, axes)
                trials.append(more)
                break
    return trials


def _resolve(trials: Sequence[Trial]) -> dict[str, list[SampleAxis | str]]:
    """Layer -> the axis of each of its calls, or what stands in the way."""
    found: dict[str, list[SampleAxis | str]] = {}
    for layer, calls in trials[-1].calls.items():
        others = [trial.calls.get(layer, []) for trial in trials]
        if any(len(other) != len(calls) for other in others):
            found[layer] = [IRREGULAR]
            continue
        found[layer] = [_axis_of(of_call) for of_call in zip(*others, strict=True)]
    return found


def _axis_of(calls: Sequence[Call]) -> SampleAxis | str:
    """What one call of a layer showed in several runs."""
    touched = [call for call in calls if any(bool(reached.any()) for reached in call.reached.values())]
    several = any(bool((torch.stack(list(call.reached.values())).sum(0) > 1).any()) for call in touched)
    if len(calls) > 1 and len({call.shape for call in calls}) == 1 and (several or not touched):
        return SHARED if several else UNTOUCHED  # where no row is for several, rows may be picked: as many, by chance
    candidates = _candidates(calls)
    if not touched:
        return UNREACHED if candidates else IRREGULAR
    if several:
        return MIXED
    fitting = [axis for axis in candidates if all(_fits(axis, call) for call in touched)]
    if len(fitting) != 1:
        return AMBIGUOUS if fitting else IRREGULAR
    dim, channel = fitting[0].dim, calls[0].channel
    return replace(fitting[0], dim=dim + (dim >= channel))


def _moving(trials: Sequence[Trial], layer: str, number: int) -> int | None:
    """The dimension along which each place was one sample's in every run, in whatever order, if there is one."""
    calls = [trial.calls[layer][number] for trial in trials if len(trial.calls.get(layer, ())) > number]
    for dim in range(min(len(call.shape) for call in calls)):
        places = [torch.stack([came.movedim(dim, 0).reshape(call.shape[dim], -1).any(1)
                               for came in call.reached.values()]).sum(0)
                  for call in calls if call.reached and call.shape.numel()]
        if all(bool((several <= 1).all()) for several in places):
            return dim + (dim >= calls[0].channel)
    every = [torch.stack(list(call.reached.values())).sum(0) for call in calls if call.reached]
    return EVERY if all(bool((several <= 1).all()) for several in every) else None


def _candidates(calls: Sequence[Call]) -> list[SampleAxis]:
    """Every way in which samples may lie along one dimension, which grows with them."""
    if len({len(call.shape) for call in calls}) > 1:
        return []
    found = []
    for dim in range(len(calls[0].shape)):
        counts = {call.shape[dim] / call.size for call in calls}
        count = counts.pop()
        if counts or count != int(count) or not count:
            continue
        found += [SampleAxis(dim, int(count) // after, after) for after in range(1, int(count) + 1)
                  if int(count) % after == 0]
    return found


def _fits(axis: SampleAxis, call: Call) -> bool:
    """Whether each sample's gradient came back to places of that sample alone."""
    sample = torch.arange(call.shape[axis.dim]) // axis.after % call.size
    return all(bool((sample[reached.movedim(axis.dim, 0).reshape(len(sample), -1).any(1)] == number).all())
               for number, reached in call.reached.items())
