"""distill(): the dense network's outputs on unlabelled samples train the smaller one."""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastscore.arguments import check_callable, check_number, check_whole
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.devices import rank_and_size
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.fingerprints import run_fingerprint
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.modes import modes_kept
from fastscore.modules.wrappers import unwrapped
from fastscore.progress import bar, shown
from fastscore.recovery.decisions import Decisions, JudgedOutputs, without_padding
from fastscore.recovery.distillation_run import PRECISIONS, DistillationReport, DistillationRun, Loss, Objective
from fastscore.recovery.features import FeatureMaps
from fastscore.recovery.optimizers import OptimizerMaker, OptimizerName, make_optimizer
from fastscore.recovery.pruned import Pruned
from fastscore.recovery.training_batches import TrainingBatches
from fastscore.rng import fork_rng


@keeps_own_on_cpu
@naming_samples("batches", "held_out")
def distill(model: nn.Module, smaller: nn.Module | Pruned, batches: Iterable[Batch], *, steps: int = 1000,
            temperature: float = 4.0, loss: Loss | None = None, features: Iterable[str] = (),
            feature_weight: float = 1.0, optimizer: OptimizerName | OptimizerMaker = "sgd",
            lr: float | None = None, warmup: float = 0.05, clip: float | None = 1.0,
            precision: Literal["bfloat16", "float16"] | None = None, held_out: Iterable[Batch] | None = None,
            looks: int = 20, patience: int | None = 10, seed: int = 0, forward: Forward = call_model,
            outputs: JudgedOutputs = None, resume: str | PathLike[str] | None = None,
            process_group: distributed.ProcessGroup | None = None, progress: bool = True) -> DistillationReport:
    """Train `smaller`, in place, to return what the dense `model` returns on unlabelled batches.

    Held-out samples judge before the first step and at `looks` equally spaced steps; `smaller` ends with the weights
    that were nearest to the dense network on them, so it is never left worse there than it was.

    Args:
        model: the dense network. It runs in evaluation mode, as a copy, and stays as it is.
        smaller: the network to train, or the PruneResult that holds it: on any device, its frozen parameters stay
            frozen. In DistributedDataParallel, every process gives batches of its own (a DistributedSampler).
        batches: tensors [N, ...], tuples (the first element is the input; the rest is never read) or dicts: a list or
            a DataLoader, which may shuffle, read once in each epoch.
        steps: updates of the weights, one batch each.
        temperature: logits of both are divided by it before the KL divergence, which counts times its square.
        loss: loss(smaller's output, dense output) -> scalar, in place of the KL divergence; it then judges, too.
            Several outputs are one to it, [N, K]; each has a KL divergence of its own, and their sum is the loss.
        features: modules whose outputs are to be alike as well, by name. Where channels of them went, `smaller` must
            be a PruneResult, and they convolutions, Linears or normalisations.
        feature_weight: what their distance (the squared error as a share of the variance) counts beside the loss.
        optimizer: "sgd" (Nesterov momentum), "adamw", or parameters -> an optimizer.
        lr: the highest learning rate (default: 0.03 for SGD, 0.003 for AdamW); the rate rises to it over the share
            `warmup` of the steps, and falls to 0 along a cosine.
        warmup: see lr.
        clip: the largest norm of the gradient of all weights together; longer ones are shortened to it. None: no limit.
        precision: of the passes, by torch.autocast; weights stay as they are. "float16" scales the loss.
        held_out: batches to judge by, not trained on. Default: one of 8 samples of `batches` (of a few, of 4 or 2),
            told by content, at most 512; where a loader changes images at random, give your own.
        looks: how often held-out samples judge.
        patience: stop after so many looks in a row that are no better than an earlier one (the start aside); None:
            never.
        seed: of all that is random: order of a shuffling loader, dropout.
        forward: forward(model, batch), for models that are called otherwise.
        outputs: which outputs count, and which of them are values rather than decisions ("error": trained and judged by
            their squared error): as fastscore.prune takes it.
        resume: a file written at every look. Called again with the same arguments after whatever stopped it, the run
            goes on from there, and ends with the same weights, bit for bit on a CPU, as far as batches depend on
            torch's random numbers alone.
        process_group: processes that share the work, each calling with the same batches and taking every size-th of
            them; a step is then as many batches as there are processes.
        progress: show a bar.

    Returns:
        What held-out samples said at each look.

    Raises:
        ValueError: networks that share weights, nothing to train, a number outside its range, batches too few, a file
            of another run. TypeError: batches that are no iterable. FloatingPointError: NaN or infinity in the loss,
            or in what the dense network returns.
        In each case, and when interrupted, `smaller` is as it was.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    if isinstance(model, Pruned):
        raise TypeError(f"model: {type(model).__name__}, which comes second, where the dense network is meant: "
                        "distill(dense, result, batches) trains result.model")
    removed = smaller.removed_indices if isinstance(smaller, Pruned) else {}
    network = smaller.model if isinstance(smaller, Pruned) else smaller
    if network is smaller and (said := _swapped(unwrapped(model), unwrapped(network, "smaller"))):
        warnings.warn(said, stacklevel=4)
    _check(model, network, steps=steps, temperature=temperature, looks=looks, patience=patience, warmup=warmup,
           clip=clip, feature_weight=feature_weight, seed=seed, precision=precision, loss=loss)
    check_callable("forward", forward, "forward(model, batch)")
    inner, wrapped = unwrapped(network, "smaller"), isinstance(network, DistributedDataParallel)
    group: Any = network.process_group if wrapped else process_group
    rank, size = rank_and_size(group)
    data = TrainingBatches(batches, held_out, seed, rank=0 if wrapped else rank, size=1 if wrapped else size,
                           first_only=forward is call_model, digests=resume is not None)
    with fork_rng(device_of(inner)), torch.inference_mode(False), torch.enable_grad(), _in_training(network):
        dense = evaluation_copy(unwrapped(model), plain=False)
        judging = Decisions(forward, outputs) if loss is None else None
        call = judging or _whole(forward)
        run = DistillationRun(dense, network, Objective(loss, temperature, FeatureMaps(dense, inner, features, removed),
                                              feature_weight, judging), call, data, group, precision,
                   make_optimizer(inner.parameters(), optimizer, lr), seed, clip)
        if resume is not None:
            same = run_fingerprint(
                inner, {"dense weights": run_fingerprint(dense, {})["weights"]}, steps=steps, seed=seed, loss=loss,
                temperature=temperature, features=list(run.objective.maps.layers), feature_weight=feature_weight,
                optimizer=optimizer, lr=lr, warmup=warmup, clip=clip, precision=precision, looks=looks,
                patience=patience, processes=size, outputs=repr(outputs))
            run.keep_in(resume, same)
        with shown(progress and rank == 0), bar("distilling", " steps", steps, run.step) as told:
            return run.to(steps, looks, patience, warmup, told)


def _whole(forward: Forward) -> Callable[[nn.Module, Batch], Mapping[str, Tensor]]:
    """All outputs as one, of tokens those that are no padding."""
    whole = checked_forward(forward)

    def call(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return without_padding({"": whole(network, batch)}, batch)

    call.checks = forward  # type: ignore[attr-defined]
    return call


@contextmanager
def _in_training(network: nn.Module) -> Iterator[None]:
    """Modes and gradients come back on leaving; weights and statistics too, where an exception ends it."""
    gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
    before = {name: value.detach().clone() for name, value in network.state_dict().items()}
    try:
        with modes_kept(network):
            yield
    except BaseException:
        network.load_state_dict(before)
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


# argument -> (raises where it is no number, whether one is in its range, one that is, what is said of others)
_NUMBERS: Mapping[str, tuple[Callable[[str, object, str], None], Callable[[float], bool], str, str]] = {
    **{name: (check_whole, lambda value: value >= 1, "20", "; it must be 1 or more")
       for name in ("steps", "looks", "patience")},
    **{name: (check_number, lambda value: value > 0, "1.0", "; it must be above 0")
       for name in ("temperature", "clip")},
    "seed": (check_whole, lambda value: abs(value) < 2**62, "0", "; it must be between -2**62 and 2**62"),
    "feature_weight": (check_number, lambda value: value >= 0, "1.0", "; it must be 0 or more"),
    "warmup": (check_number, lambda value: 0 <= value < 1, "0.05", " is outside [0, 1); it is a share of the steps"),
}
_MAY_BE_NONE = ("patience", "clip")


def _swapped(dense: nn.Module, smaller: nn.Module) -> str:
    """What is to be said where the dense network looks like a part of the other, as by a slip; empty where not."""
    sizes = [{name: parameter.shape for name, parameter in network.named_parameters()} for network in (dense, smaller)]
    counts = [sum(map(torch.Size.numel, each.values())) for each in sizes]
    pairs = [(sizes[0][name], sizes[1][name]) for name in sizes[0].keys() & sizes[1].keys()]
    within = all(len(one) == len(other) and all(map(operator.le, one, other)) for one, other in pairs)
    if counts[0] >= counts[1] or not within or all(one == other for one, other in pairs):
        return ""
    return (f"smaller: it has {counts[1]:,} parameters, and the dense model, {counts[0]:,}, looks like what is left of "
            "it once channels are gone: distill(dense, smaller) trains the second of the two")


def _check(model: nn.Module, smaller: nn.Module, precision: str | None, loss: Loss | None, **numbers: Any) -> None:
    if loss is not None:
        check_callable("loss", loss, "loss(smaller's output, dense output)")
        if isinstance(loss, type):
            raise TypeError(f"loss: the class {loss.__name__}, where an object of it is meant: {loss.__name__}()")
    for name, value in numbers.items():
        if value is None and name in _MAY_BE_NONE:
            continue
        check, holds, such_as, otherwise = _NUMBERS[name]
        check(name, value, such_as)
        if not holds(value):
            raise ValueError(f"{name}: {value}{otherwise}{', or None' if name in _MAY_BE_NONE else ''}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision: {precision!r} is none of None, {', '.join(map(repr, PRECISIONS))}")
    own = {parameter.untyped_storage()._cdata for parameter in unwrapped(model).parameters()}
    for name, parameter in unwrapped(smaller).named_parameters():
        if parameter.untyped_storage()._cdata in own:
            raise ValueError(f"smaller: {name} shares its memory with the dense model, which would change as it "
                             "learns: train a copy.deepcopy() (prune(inplace=True) leaves no dense model)")
        if parameter.is_inference():
            raise ValueError(f"smaller: {name} was made under torch.inference_mode, and cannot learn: make, or copy, "
                             "the network outside of it")
    if not any(parameter.requires_grad for parameter in smaller.parameters()):
        raise ValueError("smaller: all its parameters are frozen; smaller.requires_grad_() thaws them")
