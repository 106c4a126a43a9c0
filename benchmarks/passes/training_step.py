"""`python -m benchmarks.passes.training_step`: what `with scorer:` adds to a training step (forward, loss, backward,
SGD).

Steps with and without take turns, a few at a time; attaching and detaching are counted with those that have the
scorer. The ratio is taken within each round, and so is the cost of a tap: the time added to a step of a network of many
small layers, by the number of its taps.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from benchmarks import machine
from benchmarks.peers.measure import Stopwatch
from benchmarks.peers.task import Task

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of SGD with momentum in training mode, small enough to leave the weights near where they are."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternate(step: Callable[[], None], scorer: fastscore.Scorer, rounds: int, steps: int, device: str
              ) -> tuple[list[float], list[float]]:
    """Seconds of a step in each of `rounds` rounds of `steps` steps: (without, with the scorer)."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, rounds):  # the first warms up
        for scored in (False, True) if turn % 2 else (True, False):
            clock = Stopwatch(device)
            with clock, scorer if scored else nullcontext():
                for _ in range(steps):
                    step()
            if turn >= 0:
                seconds[scored].append(clock.seconds / steps)
    return seconds


def small_layers(layers: int, width: int = 16) -> nn.Module:
    """Linear layers in a row, which keep the length of what passes through them."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model


def per_tap(layers: int, rounds: int, steps: int, device: str) -> tuple[int, list[float], list[float]]:
    """(taps, microseconds of each in each round, milliseconds of a step without them) for batches of 4."""
    torch.manual_seed(0)
    model = small_layers(layers).to(device)
    x, y = torch.randn(4, 16, device=device), torch.randint(16, (4,), device=device)
    taps = len(Task.of(model, x, y).layers)
    without, tapped = alternate(training_step(model, x, y), fastscore.Scorer(model, x[:1]), rounds, steps, device)
    return taps, [1e6 * (b - a) / taps for a, b in zip(without, tapped, strict=True)], [1e3 * a for a in without]


def spread(values: list[float], form: str) -> str:
    """median (least to most)"""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Measure and print one table, and the cost of a tap."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes.training_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"of torchvision (default: {' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps in a row, in each round (default: 3)")
    parser.add_argument("--layers", type=int, default=200, help="small layers, to find the cost of a tap with")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    machine.settle(arguments)
    device = arguments.device
    print(f"{machine.describe(device)}\nbatches of {arguments.batch}, {arguments.size}²\n\n"
          f"{'':<14}{'taps':>5}{'ms/step':>10}{'scored':>10}   ratio", flush=True)
    for name in arguments.models:
        task = Task.random(name, arguments.batch, arguments.size, device, arguments.layout)
        scorer = fastscore.Scorer(task.model, task.graph)
        without, tapped = alternate(training_step(task.model, task.images, task.labels), scorer, arguments.rounds,
                                    arguments.steps, device)
        ratios = [b / a for a, b in zip(without, tapped, strict=True)]
        print(f"{name:<14}{len(task.layers):>5}{1e3 * statistics.median(without):>10.1f}"
              f"{1e3 * statistics.median(tapped):>10.1f}   {spread(ratios, '.3f')}", flush=True)
    taps, cost, plain = per_tap(arguments.layers, arguments.rounds, 10 * arguments.steps, device)
    print(f"\n{arguments.layers} Linear(16, 16), batches of 4: {spread(plain, '.2f')} ms/step without; "
          f"{spread(cost, '.1f')} µs for each of {taps} taps")


if __name__ == "__main__":
    main()
