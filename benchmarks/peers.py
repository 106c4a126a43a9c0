"""fastscore beside what people use today, on the same model, images and machine.

    python -m benchmarks.peers [--models resnet18 resnet50 ...] [--batch 8] [--repeats 5] [--out peers.csv]

Contestants run in turn within each repeat; the table shows medians, and the ratio to Torch-Pruning's Taylor (forward +
backward + its call) taken within each repeat, with its spread. Every contestant computes scores for every channel of
one batch; graphs are traced beforehand, but for the rows "whole call".
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

import fastscore
from fastscore.tracing import trace

BASELINE = "Torch-Pruning Taylor"


def torch_pruning_taylor(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Its documented use: loss.backward(), then one call for each group."""
    importance = tp.importance.GroupTaylorImportance()
    traced = list(tp.DependencyGraph().build_dependency(model, x[:1], verbose=False).get_all_groups())

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for group in traced:
            importance(group)

    return run


def torch_pruning_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Its documented loop: one backward pass for each sample."""
    importance = tp.importance.GroupHessianImportance()
    traced = list(tp.DependencyGraph().build_dependency(model, x[:1], verbose=False).get_all_groups())

    def run() -> None:
        importance.zero_grad()
        for loss in F.cross_entropy(model(x), y, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
        for group in traced:
            importance(group)

    return run


def plain_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The same per-sample score as most people write it: tensor hooks on the consumers' inputs, (a*g).sum."""
    graph = trace(model, x[:1])
    layers = sorted({edge.layer for group in graph.groups for edge in group.role("consumer")})
    totals: dict[str, Tensor] = {}

    def watch(layer: str) -> Callable[..., tuple[Tensor]]:
        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            view = args[0].view_as(args[0])
            if view.requires_grad:
                activation = args[0].detach()

                def receive(gradient: Tensor) -> None:
                    product = activation * gradient
                    sums = product.flatten(2).sum(2) if product.dim() > 2 else product
                    totals[layer] = totals.get(layer, 0) + sums.square().sum(0)

                view.register_hook(receive)
            return (view,)

        return before

    def run() -> None:
        handles = [model.get_submodule(layer).register_forward_pre_hook(watch(layer)) for layer in layers]
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for handle in handles:
            handle.remove()

    return run


def plain_backward(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and loss.backward() alone, without any score."""

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


def fastscore_pass(gradient: str, probes: int = 1) -> Callable[[nn.Module, Tensor, Tensor], Callable[[], float]]:
    """One batch through fastscore.score, its tracing and set-up not counted."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
        def run() -> float:
            times = []

            def timed() -> Iterator[tuple[Tensor, Tensor]]:
                for _ in range(3):  # the first batch pays for tracing, the second warms up
                    times.append(time.perf_counter())
                    yield x, y
                times.append(time.perf_counter())

            fastscore.score(model, timed(), gradient=gradient, probes=probes, progress=False)
            return times[3] - times[2]

        return run

    return prepare


def whole_fastscore(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """fastscore.score on one batch, tracing and set-up counted."""
    return lambda: fastscore.score(model, [x], progress=False) and None


def whole_torch_pruning(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Torch-Pruning's Taylor on one batch, tracing counted."""
    return lambda: torch_pruning_taylor(model, x, y)()


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Callable[[], float | None]]] = {
    BASELINE: torch_pruning_taylor,
    "Torch-Pruning Hessian": torch_pruning_hessian,
    "plain hooks": plain_hooks,
    "forward + backward alone": plain_backward,
    "fastscore, loss": fastscore_pass("loss"),
    "fastscore, random": fastscore_pass("random"),
    "fastscore, 2 probes": fastscore_pass("random", probes=2),
    "whole call, Torch-Pruning": whole_torch_pruning,
    "whole call, fastscore": whole_fastscore,
}


def measure(name: str, batch: int, repeats: int) -> list[dict[str, str | float]]:
    """A row for each contestant on the torchvision model `name`."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    runs = {contestant: prepare(model, x, y) for contestant, prepare in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {contestant: [] for contestant in runs}
    for repeat in range(repeats + 1):
        for contestant, run in runs.items():
            start = time.perf_counter()
            own = run()
            taken = time.perf_counter() - start if own is None else own
            if repeat:  # the first round warms up
                seconds[contestant].append(taken)
    rows: list[dict[str, str | float]] = []
    for contestant, taken in seconds.items():
        baseline = "whole call, Torch-Pruning" if contestant.startswith("whole") else BASELINE
        ratios = [base / own for base, own in zip(seconds[baseline], taken, strict=True)]
        rows.append({"model": name, "contestant": contestant,
                     "seconds per 100 images": round(100 * statistics.median(taken) / batch, 2),
                     "times as fast": round(statistics.median(ratios), 2),
                     "least": round(min(ratios), 2), "most": round(max(ratios), 2)})
    return rows


def main() -> None:
    """Measure, print one table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for row in measure(name, arguments.batch, arguments.repeats):
            rows.append(row)
            print("{model:<14} {contestant:<26} {seconds per 100 images:>8} s/100 images  x{times as fast:<6} "
                  "({least} to {most})".format(**row), flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
