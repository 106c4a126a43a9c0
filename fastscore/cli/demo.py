"""fastscore demo."""

import argparse
import json
from dataclasses import asdict

from fastscore.cli.argument_types import positive
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.cli.written import check_out, wrote


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "demo", run, "", "train, score, prune, repair and fine-tune a small network: a minute or two",
        "Train small networks on scikit-learn's digits, prune them to half their MACs by fastscore, by magnitude and\n"
        "at random, repair them without labels, fine-tune them briefly with, and compare.",
        "fastscore demo\nfastscore demo --networks 1 --seed 3 --out demo.png")
    command.add_argument("--out", metavar="PNG", default="fastscore-demo.png", help="the plot (default: %(default)s)")
    command.add_argument("--networks", type=positive, default=4, metavar="N",
                         help="networks to train and average, each with a split of its own (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first network (default: %(default)s)")
    add_json(command, "every outcome")


def run(arguments: argparse.Namespace) -> None:
    """Train, score, prune, compare."""
    from fastscore.cli import digits, digits_plot

    check_out(arguments)
    result = digits.run(arguments.networks, arguments.seed)
    print(json.dumps(asdict(result)) if arguments.json else result)
    digits_plot.draw(result, arguments.out)
    wrote(arguments.out)
