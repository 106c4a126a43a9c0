"""Whole calls: images in, a network of half the MACs out, tracing and scoring included; and the surgery alone."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastscore
from benchmarks.peers.measure import CannotRun, Stopwatch
from benchmarks.peers.task import Task

NEAR = 0.005  # how near to the wanted share of the MACs Torch-Pruning's ratio is sought


@dataclass(frozen=True)
class Job:
    """task: what to prune, whose images are taken `batch` at a time. macs: the share that is to remain."""

    task: Task
    batch: int
    macs: float = 0.5

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of the loss over all images, by parameter."""
        model = copy.deepcopy(self.task.model)
        backward(model, self)
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    @cached_property
    def ratio(self) -> float:
        """The share of channels that Torch-Pruning has to remove for the wanted MACs, found by bisection.

        Raises CannotRun where none leaves it near them.
        """
        low, high, share = 0.0, 1.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            model = self.with_gradients()
            pruner(model, self, middle).step()
            share = self.share(model)
            if abs(share - self.macs) < NEAR:
                return middle
            low, high = (middle, high) if share > self.macs else (low, middle)
        raise CannotRun(f"no global ratio leaves it near {self.macs:.0%} of the MACs: {middle:.4f} leaves {share:.1%}")

    def with_gradients(self) -> nn.Module:
        """A copy of the model that a backward pass over all images has left its gradients in."""
        model = copy.deepcopy(self.task.model)
        for name, parameter in model.named_parameters():
            parameter.grad = self.gradients[name].clone() if name in self.gradients else None
        return model

    def share(self, model: nn.Module) -> float:
        """The share of the MACs that `model` has left."""
        return macs(model, self.task.images[:1]) / macs(self.task.model, self.task.images[:1])


def macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-accumulates of one call of `model`, attention's included."""
    # with gradients, attention is no fused layer; the counter knows it as the matrix products that it is made of
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2


def backward(model: nn.Module, job: Job) -> None:
    """Leave the loss's gradients over all images in `model`."""
    model.zero_grad()
    for images, labels in zip(job.task.images.split(job.batch), job.task.labels.split(job.batch), strict=True):
        F.cross_entropy(model(images), labels).backward()


def pruner(model: nn.Module, job: Job, ratio: float) -> tp.pruner.BasePruner:
    """Torch-Pruning's global pruner with its Taylor importance, over the groups that fastscore scores."""
    scored = {member.layer for group in job.task.graph.groups for member in group.role("producer", "channelwise")}
    ignored = [module for name, module in model.named_modules()
               if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and name not in scored]
    return tp.pruner.BasePruner(
        model, job.task.images[:1], tp.importance.GroupTaylorImportance(), global_pruning=True, pruning_ratio=ratio,
        ignored_layers=ignored, in_channel_groups={}, out_channel_groups={}, num_heads={})


Prepare = Callable[[Job], Callable[[Stopwatch], nn.Module]]


def whole_torch_pruning(job: Job) -> Callable[[Stopwatch], nn.Module]:
    """Pruner, loss.backward() for each batch, step(); finding the ratio and copying the model are not counted."""
    ratio = job.ratio

    def run(clock: Stopwatch) -> nn.Module:
        model = copy.deepcopy(job.task.model)
        with clock:
            prunes = pruner(model, job, ratio)
            backward(model, job)
            prunes.step()
        return model

    return run


def whole_fastscore(precision: str | None = None) -> Prepare:
    """fastscore.score, its passes in `precision`, and fastscore.prune; without compensation, which Torch-Pruning does
    not have. Copying the model, of which nothing is known then, is not counted."""

    def prepare(job: Job) -> Callable[[Stopwatch], nn.Module]:
        task = job.task

        def run(clock: Stopwatch) -> nn.Module:
            model = copy.deepcopy(task.model)
            with clock:
                scores = fastscore.score(model, task.images.split(job.batch), ignore=task.ignored,
                                         precision=precision, progress=False)
                return fastscore.prune(model, scores, task.images[:1], macs=job.macs, compensate=False).model

        return run

    return prepare


def surgery_torch_pruning(traced: bool) -> Prepare:
    """step() with the gradients there; with the making of the pruner, which traces the model, where not `traced`."""

    def prepare(job: Job) -> Callable[[Stopwatch], nn.Module]:
        ratio = job.ratio

        def run(clock: Stopwatch) -> nn.Module:
            model = job.with_gradients()
            prunes = pruner(model, job, ratio) if traced else None
            with clock:
                (prunes or pruner(model, job, ratio)).step()
            return model

        return run

    return prepare


def surgery_fastscore(traced: bool) -> Prepare:
    """fastscore.prune with the scores there; it tries and copies the model, and traces it where not `traced`."""

    def prepare(job: Job) -> Callable[[Stopwatch], nn.Module]:
        task = job.task
        scores = fastscore.score(task.model, task.images.split(job.batch), ignore=task.ignored, progress=False)

        def run(clock: Stopwatch) -> nn.Module:
            model = task.model if traced else copy.deepcopy(task.model)
            with clock:
                return fastscore.prune(model, scores, task.images[:1], macs=job.macs, compensate=False).model

        return run

    return prepare


# part -> its contestants, the baseline first
PARTS: dict[str, dict[str, Prepare]] = {
    "whole": {"Torch-Pruning, whole call": whole_torch_pruning, "fastscore, whole call": whole_fastscore(),
              "fastscore, bfloat16, whole call": whole_fastscore("bfloat16")},
    "prune": {"Torch-Pruning, step() alone": surgery_torch_pruning(traced=True),
              "Torch-Pruning, pruner and step()": surgery_torch_pruning(traced=False),
              "fastscore, prune() alone": surgery_fastscore(traced=True),
              "fastscore, tracing and prune()": surgery_fastscore(traced=False)},
}
