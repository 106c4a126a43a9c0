"""fastscore bench."""

import argparse
import json

import torch

from fastscore.cli import options
from fastscore.cli.options import Commands, add_command


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "bench", run, "how fast this machine is: the kernels, and the scoring of a model",
        "Measure how many bytes the kernels read in a second here, beside what the memory gives;\n"
        "for a model, also what scoring a batch costs beside training on it.",
        "fastscore bench\n"
        "fastscore bench torchvision:resnet50 --batch-size 8\n"
        "fastscore bench nets.py:build --size 64 --device cpu --json")
    options.add_model(command, optional=True)
    options.add_pixels(command)
    command.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="default: %(default)s")
    command.add_argument("--seconds", type=options.positive, default=3, metavar="S",
                         help="for the kernels, about (default: %(default)s)")
    command.set_defaults(seed=0)
    options.add_json(command, "what was measured")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print."""
    from fastscore.cli import kernel_bench

    passed = None
    if arguments.model is not None:
        shape = options.preprocessing(arguments).shape
        batch = torch.randn(arguments.batch_size, *shape, generator=torch.Generator().manual_seed(arguments.seed))
        passed = kernel_bench.passes(options.model(arguments), batch.to(options.device(arguments)))
    rows = kernel_bench.kernels(options.device(arguments), arguments.seconds)
    print(json.dumps({"kernels": rows, "passes": passed}) if arguments.json else kernel_bench.table(rows, passed))
