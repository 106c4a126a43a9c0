"""Runs on batches of a few samples, which show where the gradient of each sample's output comes back to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.parts import Batch, first_tensor
from fastscore.graph.routing import Decisions
from fastscore.graph.trials.differences import largest_magnitude
from fastscore.graph.trials.known_samples import KnownSamples
from fastscore.graph.trials.row_gradients import rows_alone
from fastscore.modules.hooks import input_of, put_on, with_input
from fastscore.modules.inspection import device_of
from fastscore.modules.weights import recurrent
from fastscore.wording import counted

_PICKS = 3  # samples whose gradients are sent back from a batch of more

Run = Callable[[nn.Module, Batch], Sequence[Tensor]]


@dataclass(frozen=True)
class Watched:
    """A tensor to look at: a layer's input, or its output. channel_dim: where its channels are. module: the layer's
    name, where what is looked at has another."""

    channel_dim: int
    output: bool = False
    module: str = ""


@dataclass
class Call:
    """One call of a layer in a batch of `size` samples: the shape of what is looked at, without the dimension `channel`
    of its channels; for each sample whose gradient was sent back, by its number, where that came to; and whether one
    was too large for a number.
    """

    size: int
    shape: torch.Size
    channel: int
    reached: dict[int, Tensor] = field(default_factory=dict)
    overflowed: bool = False


@dataclass
class Trial:
    """One run: how large its batch was, and what it showed. anchor: what gradients are asked for. sent: holds the
    number of the sample whose gradient is on its way. decides: whether the model's code decided anything by what the
    batch holds, where that was looked for. reads: whether it made Python numbers of that. picks: whether integers of it
    may say what rows are whose: see fastscore.graph.routing.Decisions."""

    size: int
    anchor: Tensor
    calls: dict[str, list[Call]] = field(default_factory=dict)
    outputs: Sequence[Tensor] = ()
    called_with: Tensor | None = None  # the first tensor of the model's first call
    sent: list[int] = field(default_factory=list)
    decides: bool | None = None
    reads: bool = False
    picks: bool = False

    def note(self, decisions: Decisions) -> None:
        """What was seen while it ran."""
        self.decides, self.reads, self.picks = decisions.found, decisions.read, decisions.picks


def tried(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, size: int, grad: bool = True,
          exact: bool = True, values: bool = True, known: KnownSamples | None = None) -> "Trial | str":
    """`trial`, or what the model said instead."""
    try:
        return trial(model, watched, run, batch, size, grad, exact, values, known)
    except Exception as error:  # whatever the model's code does with a batch of another size
        return f"the model does not run on {counted(size, 'sample')} ({type(error).__name__}: {error})"


def trial(model: nn.Module, watched: Mapping[str, Watched], run: Run, batch: Batch, size: int, grad: bool = True,
          exact: bool = True, values: bool = True, known: KnownSamples | None = None) -> Trial:
    """A run on that batch of `size` samples. exact: with the gradients that layers send back, instead of others that
    reach the same rows. values: or exact, with what Linears make, instead of other numbers. known: what layers make of
    samples, unless exact gradients are asked for: then it is computed."""
    made = Trial(size, torch.zeros((), requires_grad=True))
    rng.start_over(device_of(model))
    shared = nullcontext() if known is None or (grad and exact) else known.run(size) if grad else known.used(size)
    with _watching(model, watched, made), torch.set_grad_enabled(grad), shared, \
            nullcontext() if exact or not grad else rows_alone(model, values, known):
        made.outputs = run(model, batch)
    return made


@contextmanager
def _watching(model: nn.Module, watched: Mapping[str, Watched], trial: Trial) -> Iterator[None]:
    def seen(layer: str, x: Tensor, what: Watched) -> Tensor:
        dim = what.channel_dim % x.dim()
        call = Call(trial.size, x.shape[:dim] + x.shape[dim + 1:], dim)
        if torch._C._current_graph_task_id() == -1:  # not run again by an activation checkpoint
            trial.calls.setdefault(layer, []).append(call)
        watched: Tensor = _Watch.apply(x, trial.anchor.to(x.device), trial.sent, call, what.output)
        return watched

    def on_input(layer: str, what: Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = input_of(args, kwargs)
        return None if recurrent.at_no_step(module, x) else with_input(args, kwargs, seen(layer, x, what))

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
                       module.register_forward_pre_hook(partial(on_input, layer, what), with_kwargs=True))
    with put_on(handles):
        yield


class _Watch(torch.autograd.Function):
    """x -> x; backward: notes where the gradient is not zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sent: list[int], call: Call, output: bool) -> Tensor:
        ctx.sent, ctx.call = sent, call
        return x.clone() if output else x.view_as(x)  # whoever takes an output may write to it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        for sample in ctx.sent:
            reached, finite = _reached(g, ctx.call.channel)
            ctx.call.reached[sample] = reached.cpu()
            ctx.call.overflowed |= not finite
        return g, g.new_zeros((), dtype=torch.float32), None, None, None


def _reached(g: Tensor, channel: int) -> tuple[Tensor, bool]:
    """(where g is not zero in some channel, whether there are numbers alone); NaN and infinity tell nothing."""
    if g.numel():
        largest = largest_magnitude(g, channel)
        if largest.isfinite().all():
            return largest != 0, True
    return ((g != 0) & g.isfinite()).any(channel), not g.numel()


def send_back(trial: Trial, axes: Sequence[int | None]) -> None:
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
