"""BatchNorm statistics measured anew: what a smaller network's layers read is not what they were trained on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.checks import check_iterable
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.modules.inspection import device_of
from fastscore.modules.modes import evaluating
from fastscore.modules.refused_batches import naming_argument
from fastscore.modules.wrappers import check_filled, unwrapped
from fastscore.recovery.calibration import share_of
from fastscore.rng import fork_rng

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SINGLE = "more than 1 value per channel"  # torch says that it expects


@keeps_own_on_cpu
@naming_samples("batches")
def recalibrate(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_model,
                process_group: distributed.ProcessGroup | None = None) -> nn.Module:
    """Measure the running statistics of the model's BatchNorms anew, in place; returns the model.

    Each becomes the plain average over batches of the batch's own statistics, with everything else in evaluation mode.
    Weights are untouched, and so are BatchNorms that keep no statistics, or are not called. A few hundred samples
    in batches of 32 or more will do.

    Args:
        model: any model with BatchNorms, on the device where the work is done.
        batches: as fastscore.score takes them; labels are not read.
        forward: forward(model, batch), for models that are called otherwise.
        process_group: processes that share the work: each calls with the same batches, takes every size-th of them,
            and has the average of all.

    Raises:
        TypeError: batches that are no iterable.
        ValueError: no BatchNorm that keeps statistics, no batch, or one that the model cannot take in training mode.
        FloatingPointError: NaN or infinity in the statistics, naming the layer.
        In either case the model is as it was.
    """
    check_iterable(batches, "batches")
    check_callable("forward", forward, "forward(model, batch)")
    check_filled(unwrapped(model))
    if not running_norms(unwrapped(model)):
        raise ValueError(f"model: {type(model).__name__} has no BatchNorm that keeps running statistics: there is "
                         "nothing to recalibrate")
    recalibrate_on(model, share_of(batches, device_of(model), process_group, forward), forward, process_group)
    return model


class NothingToMeasure(ValueError):
    """There is no batch to recalibrate on."""


def recalibrate_on(model: nn.Module, batches: Iterable[Batch], forward: Forward,
                   process_group: distributed.ProcessGroup | None, leave_out_single: bool = False) -> None:
    """As recalibrate, on batches that are this process's own already. leave_out_single: those of which a BatchNorm
    reads one value of each channel, which does not vary, do not count; a split of larger ones may leave such."""
    norms = running_norms(model)
    count = 0
    with _measuring(model, norms) as put_back, torch.no_grad():
        for batch in batches:
            before = _statistics(norms) if leave_out_single else {}
            try:
                with naming_argument("batches: the model cannot take its batches", model, forward, batch):
                    forward(model, batch)
            except ValueError as error:
                if not leave_out_single or _SINGLE not in str(error):
                    raise
                _set_statistics(norms, before)
                continue
            count += 1
        put_back(_average(norms, process_group))
        if not _sum(count, norms, process_group):
            raise NothingToMeasure("batches: there is none to recalibrate on, or none that holds a sample")
        for name, norm in norms.items():
            if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
                raise FloatingPointError(f"{name}: NaN or infinity in what it reads of the batches")


def running_norms(model: nn.Module) -> dict[str, Any]:
    """Name -> each BatchNorm that keeps running statistics."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None}


def _statistics(norms: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    return {name: [getattr(norm, key).clone() for key in _STATISTICS] for name, norm in norms.items()}


def _set_statistics(norms: Mapping[str, Any], values: Mapping[str, list[Tensor]]) -> None:
    for name, each in values.items():
        for key, value in zip(_STATISTICS, each, strict=True):
            getattr(norms[name], key).copy_(value)


@contextmanager
def _measuring(model: nn.Module, norms: Mapping[str, Any]) -> Iterator[Callable[[Iterable[str]], None]]:
    """BatchNorms in training mode, averaging from nothing, and all else in evaluation mode; modes, settings and the
    states of random numbers come back, and the statistics too where an exception ends it, or of those that the function
    is called with that it yields."""
    settings = {name: (norm.momentum, norm.track_running_stats) for name, norm in norms.items()}
    before = _statistics(norms)

    def put_back(names: Iterable[str]) -> None:
        _set_statistics(norms, {name: before[name] for name in names})

    try:
        with evaluating(model), fork_rng(device_of(model)):
            for norm in norms.values():
                norm.track_running_stats = True  # what is False keeps statistics as they are, which evaluation goes by
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            yield put_back
    except BaseException:
        put_back(norms)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum, norm.track_running_stats = settings[name]


def _average(norms: Mapping[str, Any], process_group: distributed.ProcessGroup | None) -> list[str]:
    """Give every process the average over the calls of all; the norms that none of them came by: that do not run, or
    whose statistics the model's own code reads (as F.batch_norm does)."""
    own = torch.tensor([float(norm.num_batches_tracked) for norm in norms.values()])
    calls = own.clone()
    if process_group is not None:
        calls = calls.to(next(iter(norms.values())).running_mean.device)
        distributed.all_reduce(calls, group=process_group)
        for norm, count, total in zip(norms.values(), own.tolist(), calls.tolist(), strict=True):
            for statistic in (norm.running_mean, norm.running_var):
                statistic.mul_(count / max(total, 1))  # of one that runs in some batches alone, those count
                distributed.all_reduce(statistic, group=process_group)
            norm.num_batches_tracked.fill_(int(total))
    return [name for name, count in zip(norms, calls.tolist(), strict=True) if not count]


def _sum(count: int, norms: Mapping[str, Any], process_group: distributed.ProcessGroup | None) -> int:
    """A count of all processes."""
    if process_group is None:
        return count
    total = torch.tensor([float(count)], device=next(iter(norms.values())).running_mean.device)
    distributed.all_reduce(total, group=process_group)
    return int(total)
