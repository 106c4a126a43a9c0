"""Models that run, but not again; or on a batch, but not on one sample of it; or write over what gradients need."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.calls import call_of
from fastscore.batches.devices import usable
from fastscore.batches.parts import Batch, map_tensors, tensors_of, version_of
from fastscore.graph.cutting import own_tensors
from fastscore.graph.trials.plain_layers import plain_kind
from fastscore.graph.trials.recording import Recording
from fastscore.modules import written_parameters
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import put_on


def check_runs_again(eval_model: nn.Module, whole: Callable[[nn.Module], Tensor]) -> None:
    """Raise ValueError for a model that has run once, and does not again: no group is to blame then."""
    try:
        whole(evaluation_copy(eval_model))
    except Exception as error:  # of the model's code, or forward=
        raise ValueError(f"{type(eval_model).__name__}: it ran on example_inputs, and a copy of it does not "
                         f"({type(error).__name__}: {error}): the model, and forward=, must run each time, on copies, "
                         "too") from error


def only_whole(eval_model: nn.Module, run: Callable[[nn.Module, Batch], Sequence[Tensor]], example: Batch,
               batch: Batch | None) -> str:
    """What is wrong with a model that runs on `batch`, and not on `example`, which is one sample of it, and the way
    out; empty where that is not so."""
    error = error_of(lambda: run(evaluation_copy(eval_model), example))
    if batch is None or error is None or \
            error_of(lambda: run(evaluation_copy(eval_model), map_tensors(usable, batch))) is not None:
        return ""
    return "it runs on the batch, and not on one sample of it by itself (the first row of each tensor that has a row " \
           f"for each), which it is traced on: {type(error).__name__}: {error}. Pass forward=lambda model, batch: " \
           f"{call_of(batch)}, and it is traced on the whole batch"


def run_between(recording: Recording) -> None:
    """Run a recorded model once more, of whose layers those of PyTorch's own code give what they gave."""
    with recording.computing([name for name, layer in recording.layers.items() if plain_kind(layer) is None]):
        recording.run_again(recording.model)


def overwriting(model: nn.Module, run: Callable[[nn.Module], object],
                run_as_trained: Callable[[nn.Module], Sequence[Tensor]]) -> str:
    """What an evaluation copy writes to though a gradient needs it, and the way out. run: its outputs, on an example;
    run_as_trained: those that it has on the way that training takes."""
    scaled = next((name for name, module in model.named_modules() if getattr(module, "max_norm", None) is not None), "")
    layer = _overwritten(model, run)
    if scaled and not layer:
        return f"{scaled} scales rows of its weight in place whenever it runs (max_norm), and code reads that " \
               "weight, too, so that gradients of one run are lost in the next, and what it returns depends on what " \
               f"it was given before: let it scale all rows once, model.{scaled}(torch.arange(model.{scaled}" \
               f".num_embeddings)), and set model.{scaled}.max_norm = None"
    if (written := sorted(written_parameters.noted(model))) and not layer:
        return f"its code writes to {written[0]} whenever it runs, and reads it, too, so that gradients of one run " \
               "are lost in the next, and what it returns depends on what it was given before: do that once, before, " \
               "and not in forward (of rows that are looked up, leave max_norm out)"
    said = f"its code writes in place to what {layer or 'an operation'} has read, so that no gradient can be computed"
    if error_of(lambda: _send_back(model, run_as_trained)) is None:
        return f"{said} in evaluation mode, as in training it can: give a forward= that calls it as training does " \
               "(without a cache, fastscore.integrations.transformers.forward for transformers' models)"
    return f"{said}, here or in training: write `x = x + branch(x)`, where it says `x += branch(x)`"


@torch.enable_grad()
def _send_back(model: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> None:
    """Send a gradient back through a copy of a model."""
    copy = evaluation_copy(model)
    own_tensors.require_gradients(copy)
    torch.stack([made.sum() for made in run(copy)]).sum().backward()


def _overwritten(model: nn.Module, run: Callable[[nn.Module], object]) -> str | None:
    """The innermost module that reads, first of all, what is written to afterwards though a gradient needs it, as in
    `x += branch(norm(x))`; None where none does."""
    read: list[tuple[str, Tensor, int]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.extend((name, x, version_of(x)) for x in tensors_of((args, kwargs)))

    with put_on(module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
                for name, module in model.named_modules() if not module._modules):
        run(model)
    return next((name for name, x, version in read if version_of(x) != version), None)


@torch.no_grad()
def error_of(call: Callable[[], object]) -> Exception | None:
    """What a call of the model's code, or forward=, raises; None where it returns."""
    try:
        call()
    except Exception as error:  # whatever that code raises
        return error
    return None
