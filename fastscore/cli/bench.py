"""fastscore bench: how fast the kernels read on this machine, and what scoring costs there beside training."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import ops
from fastscore.cli import options
from fastscore.cli.argument_types import positive
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.scoring.engine import score

SHAPE = (16, 64, 56, 56)  # [N, C, H, W]: 12.8 MB of float32 for each of two tensors, more than most caches hold
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
BATCHES = 5
Clock = Callable[[], float]


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "bench", run, "[MODEL] ", "how fast this machine is: the kernels, and the scoring of a model",
        "Measure how many bytes the kernels read in a second here, beside what the memory gives;\n"
        "for a model, also what scoring a batch costs beside training on it.",
        "fastscore bench\n"
        "fastscore bench torchvision:resnet50 --batch-size 8\n"
        "fastscore bench nets.py:build --size 64 --device cpu --json")
    options.add_model(command, optional=True)
    options.add_pixels(command)
    command.add_argument("--batch-size", type=positive, default=8, metavar="N",
                         help="images at once (default: %(default)s)")
    command.add_argument("--seconds", type=positive, default=3, metavar="S",
                         help="for the kernels, about (default: %(default)s)")
    command.set_defaults(seed=0)
    add_json(command, "what was measured")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print."""
    passed = None
    if arguments.model is not None:
        prepare = options.preprocessing(arguments)
        drawn = torch.Generator().manual_seed(arguments.seed)
        batch = torch.randn(arguments.batch_size, *prepare.shape, generator=drawn)
        passed = passes(options.model(arguments, prepare), batch.to(options.device(arguments)))
    rows = kernels(options.device(arguments), arguments.seconds)
    print(json.dumps({"kernels": rows, "passes": passed}) if arguments.json else table(rows, passed))


def kernels(device: torch.device, seconds: float = 3.0, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """Rows of dtype, layout, and 10⁹ bytes read in a second by channel_dot, by eager PyTorch and by torch.dot.

    torch.dot reads as many bytes of the same dtype in one piece: what the memory gives. Medians of interleaved rounds,
    as many as fit into `seconds` for all rows together, three at least.
    """
    rows = []
    for dtype in DTYPES:
        for layout, memory_format in LAYOUTS.items():
            a, g = (torch.randn(SHAPE, device=device).to(dtype, memory_format=memory_format) for _ in range(2))
            calls = {"fastscore": partial(ops.channel_dot, a, g), "eager": partial(_eager, a, g),
                     "dot": partial(torch.dot, *(x.as_strided((x.numel(),), (1,)) for x in (a, g)))}
            took = _medians(calls, device, seconds / (len(DTYPES) * len(LAYOUTS)), clock)
            read = 2 * a.numel() * a.element_size() / 1e9
            rows.append({"dtype": str(dtype).removeprefix("torch."), "layout": layout,
                         **{name: read / each for name, each in took.items()}})
    return rows


def _eager(a: Tensor, g: Tensor) -> Tensor:
    return (a * g).sum((2, 3))


def passes(model: nn.Module, batch: Tensor, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Seconds for a batch [N, ...]: `training`, forward and backward to every weight, and `scoring`; and `tracing`.

    scoring: what one more batch adds to score(). tracing: what a call takes beside its batches. The training is of a
    copy in evaluation mode, so that nothing of `model` changes; medians of three interleaved rounds.
    """
    trained = evaluation_copy(model).requires_grad_()

    def train() -> None:
        trained(batch).square().mean().backward()
        for parameter in trained.parameters():
            parameter.grad = None

    def call(count: int) -> None:
        score(model, [batch] * count, progress=False)

    train()
    took = _medians({"training": train, "one": lambda: call(1), "several": lambda: call(1 + BATCHES)},
                    device_of(model), 0.0, clock)
    scoring = (took["several"] - took["one"]) / BATCHES
    return {"training": took["training"], "scoring": scoring, "tracing": took["one"] - scoring}


def table(rows: list[dict[str, Any]], passed: Mapping[str, float] | None) -> str:
    """What was measured, as text."""
    lines = [f"{'':24} {'fastscore':>10} {'torch.dot':>10} {'eager':>10}   10⁹ bytes read in a second"]
    lines += [f"{row['dtype'] + ', ' + row['layout']:24} {row['fastscore']:>10.1f} {row['dot']:>10.1f} "
              f"{row['eager']:>10.1f}" for row in rows]
    if passed is not None:
        lines += ["", *(f"{name:24} {passed[name]:>10.4f}   seconds {what}" for name, what in (
            ("training", "for a batch, forward and backward to every weight"), ("scoring", "for a batch"),
            ("tracing", "for each call of score()")))]
    return "\n".join(lines)


def _medians(contestants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float,
             clock: Clock) -> dict[str, float]:
    """name -> the median time of a call, in rounds of one call each until `seconds` are over, three at least."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    took: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    wait()
    end = clock() + seconds
    while len(next(iter(took.values()))) < 3 or clock() < end:
        for name, call in contestants.items():
            start = clock()
            call()
            wait()
            took[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in took.items()}
