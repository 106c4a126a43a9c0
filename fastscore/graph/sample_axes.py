"""Which rows of a layer's input belong to which sample: found by sending a gradient back from one sample at a time.

A row that the gradient of sample n's output reaches, and no other sample's, is a row of sample n: what activation and
gradient make of it counts for that sample and no other. So the model runs on a few samples, once for each of two batch
sizes: a dimension counts samples only if it grows with them (T = N proves nothing), and only in the order in which
gradients come back. Rows that a model's code routes by what they hold must lie so whatever it decides (see
fastscore.graph.routing). The layout that is left is the one for batches of any size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, first_tensor, map_tensors
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.routing import Decisions
from fastscore.graph.trials.trial_inputs import batch_of, has_masks, other_masks, randomize_zeros
from fastscore.modules.hooks import input_of, with_input
from fastscore.modules.inspection import channel_dim
from fastscore.modules.sample_axis import SampleAxes, SampleAxis, Untold, joined_axis
from fastscore.wording import counted

_SIZES = (2, 3, 4, 5, 7)  # of batches: the first two as a rule, the others where those leave a choice
_DECISIONS = 2  # runs in which the model's code decides otherwise about what a batch holds
_PICKS = 3  # samples whose gradients are sent back from a batch of more

Run = Callable[[nn.Module, Batch], Sequence[Tensor]]

SHARED = "what {0} reads is the same for all samples, whose gradients there cannot be told apart"
MIXED = "what {0} reads of one sample reaches the outputs of others, so that samples cannot be told apart"
_UNTOLD = "it cannot be told which of the rows that {0} reads belong to which sample: "
IRREGULAR = _UNTOLD + "the model's code routes, gathers, flips or loops over them"
UNREACHED = _UNTOLD + "no sample that was tried sends a gradient back to it"
AMBIGUOUS = _UNTOLD + "the gradients that come back fit more than one order"
ALONE = ": it is scored where batches have one sample each"


@dataclass(frozen=True)
class Watched:
    """A tensor to look at: a layer's input, or its output. channel_dim: where its channels are. module: the layer's
    name, where what is looked at has another."""

    channel_dim: int
    output: bool = False
    module: str = ""


@dataclass
class _Call:
    """One call of a layer in a batch of `size` samples: the shape of what is looked at, without the dimension `channel`
    of its channels; and for each sample whose gradient was sent back, by its number, where that came to."""

    size: int
    shape: torch.Size
    channel: int
    reached: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Trial:
    """One run: how large its batch was, and what it showed. anchor: what gradients are asked for. sent: holds the
    number of the sample whose gradient is on its way. decides: whether the model's code decided anything by what the
    batch holds, where that was looked for."""

    size: int
    anchor: Tensor
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    outputs: Sequence[Tensor] = ()
    called_with: Tensor | None = None  # the first tensor of the model's first call
    sent: list[int] = field(default_factory=list)
    decides: bool | None = None


def of_graph(model: nn.Module, graph: ChannelGraph, run: Run, run_as_in_training: Run, example: Batch) -> SampleAxes:
    """The sample axes of what is tapped: the inputs of consumers and the outputs of BatchNorms. See `find`.

    run_as_in_training: for layers that `run` does not call.
    """
    watched = {edge.layer: Watched(channel_dim(model.get_submodule(edge.layer)))
               for group in (*graph.groups, *graph.experts) for edge in group.edges}
    watched |= {edge.tap: Watched(edge.dim, True, edge.layer) for group in graph.blocks for edge in group.edges}
    watched |= {edge.tap: Watched(-1, edge.role == "query", edge.layer) for group in graph.head_dims
                for edge in group.edges}
    watched |= {name: Watched(1, output=True) for name, module in model.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    axes = find(model, watched, run, example) if watched else SampleAxes()
    inactive = {layer: watched[layer] for layer in watched.keys() - axes.calls.keys()}
    if not inactive:
        return axes
    return replace(axes, calls={**axes.calls, **find(model, inactive, run_as_in_training, example).calls})

VARYING = ", as many numbers as it finds"  # of an output whose size is no multiple of the number of samples


def find(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch) -> SampleAxes:
    """The sample axes of what a model's layers read or make.

    Args:
        model: an evaluation copy that nobody else uses; parameters that are zero, which let no gradient pass, become
            random.
        watched: layer -> what to look at.
        run: (model, batch) -> its floating-point outputs.
        example: a batch; samples of it make up the batches that are tried.

    Returns:
        What is known of each layer that ran; every reason says why a layer's samples cannot be told apart.
    """
    model.requires_grad_(False)
    randomize_zeros(model)
    trials = _shapes_at_two_sizes(model, watched, run, example)
    if isinstance(trials, str):
        return SampleAxes(dict.fromkeys(watched, (Untold(trials),)))
    axes = [joined_axis([trial.outputs[place].shape for trial in trials], [trial.size for trial in trials])
            for place in range(min(len(trial.outputs) for trial in trials))]
    called_with = [trial.called_with for trial in trials if trial.called_with is not None]
    inputs = joined_axis([tensor.shape for tensor in called_with], [trial.size for trial in trials]) \
        if len(called_with) == len(trials) else None
    values = called_with[-1].numel() // trials[-1].size if inputs is not None else 0
    if None in axes or not axes:
        shown = " and ".join(f"{', '.join(str(list(output.shape)) for output in trial.outputs)} for {trial.size}"
                             for trial in trials)
        reason = "which dimension of the output counts samples cannot be told: with samples along the first " \
            f"dimension of the batch, it is {shown} of them"
        others = [_tried(model, watched, run, batch_of(example, size), size, False) for size in _SIZES[2:]]
        if _varies([*trials, *(trial for trial in others if isinstance(trial, _Trial))]):
            reason += VARYING
        return SampleAxes(dict.fromkeys(watched, (Untold(reason),)), 0, inputs, values)
    batch = batch_of(example, trials[-1].size) if len(trials) > 1 else example
    second = _second_dimension(model, run, batch, trials[-1].outputs[0])
    otherwise = _decided_otherwise(model, watched, run, batch, trials[-1], axes)
    _send_back(trials[-1], axes)
    found = _resolve([*otherwise, *trials])
    for size in _SIZES[2:] if len(trials) > 1 else ():
        if not any(axis == AMBIGUOUS for of_layer in found.values() for axis in of_layer):
            break
        more = _tried(model, watched, run, batch_of(example, size), size)
        if not isinstance(more, str):
            _send_back(more, axes)
            trials.append(more)
            found = _resolve([*otherwise, *trials])
    calls = {layer: tuple(axis if isinstance(axis, SampleAxis) else
                          Untold(axis.format(layer) + ALONE, axis != UNREACHED) for axis in of_layer)
             for layer, of_layer in found.items()}
    return SampleAxes(calls, axes[0] or 0, inputs, values, second)


def _varies(trials: Sequence[_Trial]) -> bool:
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

        torch.manual_seed(0)
        with torch.no_grad():
            (changed, *_) = run(model, map_tensors(replace_first, batch))
        left = output.shape[dim] - 1
        before, after = (each.detach().narrow(dim, 1, left).nan_to_num() for each in (output, changed))
        rounding: float = torch.finfo(before.dtype).eps ** 0.5
        return float((after - before).abs().max()) > rounding * float(before.abs().max())

    return others_change(0) and not others_change(1)


def _shapes_at_two_sizes(model: nn.Module, watched: Mapping[str, Watched], run: Run, example: Batch
                         ) -> list[_Trial] | str:
    """Two runs, the second with a graph; or one, on the example as it is, where the model takes no other size."""
    small, large = _SIZES[:2]
    first = _tried(model, watched, run, batch_of(example, small), small, grad=False)
    batch = batch_of(example, large)
    with Decisions(batch) as noted:
        second = _tried(model, watched, run, batch, large)
    if isinstance(second, str):  # it may be the looking for decisions that does not run
        second = _tried(model, watched, run, batch, large)
    else:
        second.decides = noted.found
    if not isinstance(first, str) and not isinstance(second, str):
        return [first, second]
    count = _samples_of(example)
    as_it_is = _tried(model, watched, run, example, count) if count > 1 else ""
    if not isinstance(as_it_is, str):
        return [as_it_is]
    return (as_it_is or (first if isinstance(first, str) else str(second))) + ALONE


def _samples_of(example: Batch) -> int:
    tensor = first_tensor(example)
    return len(tensor) if tensor is not None and tensor.dim() else 0


def _decided_otherwise(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, known: _Trial,
                       axes: Sequence[int | None]) -> list[_Trial]:
    """Runs like the known one, on its batch, in which the model's code decides otherwise about what the batch holds;
    none where it decides nothing, or does not run then."""
    shapes = [output.shape for output in known.outputs]
    if known.decides is None:
        with Decisions(batch) as noted:
            _tried(model, watched, run, batch, known.size, grad=False)
        known.decides = noted.found
    trials = []
    for seed in range(_DECISIONS) if known.decides or has_masks(batch) else ():
        other = other_masks(batch, seed)
        with Decisions(other, seed):
            trial = _tried(model, watched, run, other, known.size)
        if not isinstance(trial, str) and [output.shape for output in trial.outputs] == shapes:
            _send_back(trial, axes)
            trials.append(trial)
    return trials


def _tried(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, size: int, grad: bool = True
           ) -> "_Trial | str":
    """A run on that batch of `size` samples, or what the model said instead."""
    try:
        return _trial(model, watched, run, batch, size, grad)
    except Exception as error:  # whatever the model's code does with a batch of another size
        return f"the model does not run on {counted(size, 'sample')} ({type(error).__name__}: {error})"


def _trial(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, size: int, grad: bool = True
           ) -> _Trial:
    """A run on that batch of `size` samples."""
    trial = _Trial(size, torch.zeros((), requires_grad=True))
    torch.manual_seed(0)
    with _watching(model, watched, trial), torch.set_grad_enabled(grad):
        trial.outputs = run(model, batch)
    return trial


@contextmanager
def _watching(model: nn.Module, watched: Mapping[str, Watched], trial: _Trial) -> Iterator[None]:
    def seen(layer: str, x: Tensor, what: Watched) -> Tensor:
        dim = what.channel_dim % x.dim()
        call = _Call(trial.size, x.shape[:dim] + x.shape[dim + 1:], dim)
        if torch._C._current_graph_task_id() == -1:  # not run again by an activation checkpoint
            trial.calls.setdefault(layer, []).append(call)
        watched: Tensor = _Watch.apply(x, trial.anchor.to(x.device), trial.sent, call, what.output)
        return watched

    def on_input(layer: str, what: Watched) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_input(args, kwargs, seen(layer, input_of(args, kwargs), what))

        return hook

    def on_output(layer: str, what: Watched) -> Callable[..., Any]:
        return lambda module, args, output: (seen(layer, output[0], what), *output[1:]) \
            if isinstance(output, tuple) else seen(layer, output, what)

    def on_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if trial.called_with is None:
            trial.called_with = first_tensor((args, kwargs))

    handles = [model.register_forward_pre_hook(on_model, with_kwargs=True)]
    for layer, what in watched.items():
        module = model.get_submodule(what.module or layer)
        handles.append(module.register_forward_hook(on_output(layer, what)) if what.output else
                       module.register_forward_pre_hook(on_input(layer, what), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(torch.autograd.Function):
    """x -> x; backward: notes where the gradient is not zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sent: list[int], call: _Call, output: bool) -> Tensor:
        ctx.sent, ctx.call = sent, call
        return x.clone() if output else x.view_as(x)  # whoever takes an output may write to it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        for sample in ctx.sent:
            ctx.call.reached[sample] = ((g != 0) & g.isfinite()).any(ctx.call.channel).cpu()  # NaN tells nothing
        return g, g.new_zeros((), dtype=torch.float32), None, None, None


def _send_back(trial: _Trial, axes: Sequence[int | None]) -> None:
    """A random gradient from one sample's output after another's."""
    picks = range(trial.size) if trial.size <= _PICKS else (*range(_PICKS - 1), trial.size - 1)
    pairs = [(output, axis) for output, axis in zip(trial.outputs, axes, strict=False)
             if output.requires_grad and axis is not None]
    for sample in picks:
        generator = torch.Generator().manual_seed(sample)
        gradients = []
        for output, axis in pairs:
            gradient = torch.zeros_like(output)
            part = gradient.select(axis, sample)
            part.copy_(torch.randn(part.shape, generator=generator))
            gradients.append(gradient)
        trial.sent[:] = [sample]
        if pairs:
            torch.autograd.grad([output for output, _ in pairs], [trial.anchor], gradients, retain_graph=True,
                                allow_unused=True)
    trial.outputs = ()  # and their graph


def _resolve(trials: Sequence[_Trial]) -> dict[str, list[SampleAxis | str]]:
    """Layer -> the axis of each of its calls, or what stands in the way."""
    found: dict[str, list[SampleAxis | str]] = {}
    for layer, calls in trials[-1].calls.items():
        others = [trial.calls.get(layer, []) for trial in trials]
        if any(len(other) != len(calls) for other in others):
            found[layer] = [IRREGULAR]
            continue
        found[layer] = [_axis_of(of_call) for of_call in zip(*others, strict=True)]
    return found


def _axis_of(calls: Sequence[_Call]) -> SampleAxis | str:
    """What one call of a layer showed in several runs."""
    if len(calls) > 1 and len({call.shape for call in calls}) == 1:
        return SHARED
    touched = [call for call in calls if any(bool(reached.any()) for reached in call.reached.values())]
    candidates = _candidates(calls)
    if not touched:
        return UNREACHED if candidates else IRREGULAR
    if any(bool((torch.stack(list(call.reached.values())).sum(0) > 1).any()) for call in touched):
        return MIXED
    fitting = [axis for axis in candidates if all(_fits(axis, call) for call in touched)]
    if len(fitting) != 1:
        return AMBIGUOUS if fitting else IRREGULAR
    dim, channel = fitting[0].dim, calls[0].channel
    return replace(fitting[0], dim=dim + (dim >= channel))


def _candidates(calls: Sequence[_Call]) -> list[SampleAxis]:
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


def _fits(axis: SampleAxis, call: _Call) -> bool:
    """Whether each sample's gradient came back to places of that sample alone."""
    sample = torch.arange(call.shape[axis.dim]) // axis.after % call.size
    return all(bool((sample[reached.movedim(axis.dim, 0).reshape(len(sample), -1).any(1)] == number).all())
               for number, reached in call.reached.items())
