"""The ways to score channels: each prepares once, and then scores one batch as often as it is asked.

All work on the same model, batch and channel groups, and all but those of Torch-Pruning and the gates compute the same
number: the mean over samples of s², s being Σ activation x gradient over the layers that read a channel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import fastscore
from benchmarks.peers.measure import CannotRun, Stopwatch
from benchmarks.peers.task import Importances, Prepare, Run, Task, over_positions, squares, warmed


def plain_hooks(frozen: bool = False, compiled: bool = False) -> Prepare:
    """The score as one writes it: hooks on the layers' inputs, which add (a * g).sum() up in a backward pass.

    frozen: on a copy whose weights take no gradient, so that none is computed; the graph begins at the first such
    layer. compiled: with torch.compile, in one graph.
    """

    def prepare(task: Task) -> Run:
        model, readout = task.own_copy(frozen, hookable=True), squares(task.graph, task.images.device)
        leaf = task.images.new_zeros(()).requires_grad_()
        totals: dict[str, Tensor] = {}

        def watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
            def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                (x,) = args
                if not x.requires_grad:  # inside torch.compile, requires_grad_() here gives wrong gradients
                    x = x + leaf if compiled else x.detach().requires_grad_()
                view, activation = x.view_as(x), x.detach()

                def receive(gradient: Tensor) -> None:
                    total.add_(over_positions(activation * gradient, module))

                view.register_hook(receive)
                return (view,)

            return before

        for name in task.layers:
            layer = model.get_submodule(name)
            width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            totals[name] = task.images.new_zeros(len(task.images), width)
            layer.register_forward_pre_hook(watch(totals[name]))
        loss = torch.compile(lambda: task.loss(model), fullgraph=True, dynamic=False) if compiled else \
            lambda: task.loss(model)

        def run(clock: Stopwatch) -> Importances:
            with clock:
                for total in totals.values():
                    total.zero_()
                loss().backward()
                found = readout(totals)
            model.zero_grad()
            return found

        return run

    return prepare


def forward_backward(task: Task) -> Run:
    """Forward and loss.backward() alone, without any score."""
    model = task.own_copy()

    def run(clock: Stopwatch) -> Importances:
        with clock:
            task.loss(model).backward()
        model.zero_grad()
        return {}

    return run


class _Edge(nn.Module):
    """Hands on an alias of its input, so that the gradient at it is that of the layer behind it alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


def captum(task: Task) -> Run:
    """captum's LayerGradientXActivation of the loss of each sample, at the input of every layer that reads channels."""
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise CannotRun(f"captum is not installed ({error})") from error
    model, readout, edges = task.own_copy(hookable=True), squares(task.graph, task.images.device), {}
    for name in task.layers:
        edges[name] = _Edge()
        model.set_submodule(name, nn.Sequential(edges[name], model.get_submodule(name)))
    layers = {name: task.model.get_submodule(name) for name in task.layers}
    attribution = LayerGradientXActivation(
        lambda images: F.cross_entropy(model(images), task.labels, reduction="none") / len(images),
        list(edges.values()))

    def run(clock: Stopwatch) -> Importances:
        with clock:
            products = attribution.attribute(task.images)
            return readout({name: over_positions(product.detach(), layers[name])
                            for name, product in zip(edges, products, strict=True)})

    return run


class _Gate(nn.Module):
    """Multiplies each channel by its weight, 1."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones_like(like))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, *[1] * (x.dim() - 2))


def gates(task: Task) -> Run:
    """Gates of ones behind every BatchNorm; (∂L/∂gate)² of the batch. Molchanov et al., arXiv 1906.10771, section 3."""
    model = task.own_copy()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise CannotRun("it has no BatchNorm to put gates behind")
    gate = {}
    for name in norms:
        norm = model.get_submodule(name)
        gate[name] = _Gate(norm.running_mean)
        model.set_submodule(name, nn.Sequential(norm, gate[name]))

    def run(clock: Stopwatch) -> Importances:
        with clock:
            task.loss(model).backward()
            found = {name: layer.weight.grad.square() for name, layer in gate.items()}
        model.zero_grad()
        return found

    return run


def torch_pruning(importance: Any, per_sample: bool) -> Prepare:
    """Torch-Pruning's documented use of `importance`: loss.backward(), of each sample where it says so, then a call
    for each group."""

    def prepare(task: Task) -> Run:
        model, score = task.own_copy(), importance()
        dependencies = tp.DependencyGraph().build_dependency(model, task.images[:1], verbose=False)
        groups = {}
        for group in task.graph.groups:
            layer = model.get_submodule(group.name)
            groups[group.name] = dependencies.get_pruning_group(
                layer, dependencies.get_pruner_of_module(layer).prune_out_channels, list(range(group.channels)))
        model.eval()  # build_dependency sees to that today, but does not say so

        def run(clock: Stopwatch) -> Importances:
            with clock:
                if per_sample:
                    score.zero_grad()
                    for loss in task.loss(model, "none"):
                        model.zero_grad()
                        loss.backward(retain_graph=True)
                        score.accumulate_grad(model)
                else:
                    task.loss(model).backward()
                found = {name: score(group) for name, group in groups.items()}
            model.zero_grad()
            return found

        return run

    return prepare


def fastscore_pass(**options: Any) -> Prepare:
    """A batch through fastscore.score with `options`; its tracing and set-up are not counted."""

    def prepare(task: Task) -> Run:
        batch = (task.images, task.labels)

        def run(clock: Stopwatch) -> Importances:
            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                yield batch  # traces and sets up
                yield from [batch] * 3  # warms up: the others' models have run in earlier rounds, too
                with clock:
                    yield batch

            return fastscore.score(task.model, batches(), ignore=task.ignored, progress=False, **options)

        return run

    return prepare


BASELINE = "Torch-Pruning, Taylor"
_PEERS: dict[str, Prepare] = {
    BASELINE: torch_pruning(tp.importance.GroupTaylorImportance, per_sample=False),
    "Torch-Pruning, Hessian": torch_pruning(tp.importance.GroupHessianImportance, per_sample=True),
    "captum": captum,
    "gates": gates,
    "plain hooks": plain_hooks(),
    "plain hooks, compiled": plain_hooks(compiled=True),
    "plain hooks, frozen": plain_hooks(frozen=True),
    "plain hooks, frozen, compiled": plain_hooks(frozen=True, compiled=True),
    "forward and backward alone": forward_backward,
}
CONTESTANTS: dict[str, Prepare] = {
    **{name: warmed(prepare) for name, prepare in _PEERS.items()},
    "fastscore, loss": fastscore_pass(gradient="loss"),
    "fastscore, random": fastscore_pass(),
    "fastscore, random, no graph": fastscore_pass(graph=False),
    "fastscore, 2 probes": fastscore_pass(probes=2),
    "fastscore, bfloat16": fastscore_pass(precision="bfloat16"),
    "fastscore, bfloat16, 2 probes": fastscore_pass(precision="bfloat16", probes=2),
    "fastscore, compiled": fastscore_pass(compile=True),
    "fastscore, bfloat16, compiled": fastscore_pass(precision="bfloat16", compile=True),
}
# what has a number for each sample, the baseline first
PER_SAMPLE = ("Torch-Pruning, Hessian", "captum", "plain hooks", "fastscore, loss", "fastscore, random",
              "fastscore, bfloat16")
