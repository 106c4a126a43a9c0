"""Models that run, but not again; or on a batch, but not on one sample of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastscore.batches.calls import call_of
from fastscore.batches.devices import usable
from fastscore.batches.parts import Batch, map_tensors
from fastscore.graph.trials.plain_layers import plain_kind
from fastscore.graph.trials.recording import Recording
from fastscore.modules.evaluation_copy import evaluation_copy


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
    error = _error(eval_model, run, example)
    if batch is None or error is None or _error(eval_model, run, map_tensors(usable, batch)) is not None:
        return ""
    return "it runs on the batch, and not on one sample of it by itself (the first row of each tensor that has a row " \
           f"for each), which it is traced on: {type(error).__name__}: {error}. Pass forward=lambda model, batch: " \
           f"{call_of(batch)}, and it is traced on the whole batch"


def run_between(recording: Recording) -> None:
    """Run a recorded model once more, of whose layers those of PyTorch's own code give what they gave."""
    with recording.computing([name for name, layer in recording.layers.items() if plain_kind(layer) is None]):
        recording.run_again(recording.model)


@torch.no_grad()
def _error(model: nn.Module, run: Callable[[nn.Module, Batch], Sequence[Tensor]], batch: Batch) -> Exception | None:
    try:
        run(evaluation_copy(model), batch)
    except Exception as error:  # of the model's code, or forward=
        return error
    return None
