"""fastscore info."""

import argparse
import json

import fastscore
from fastscore.cli import options
from fastscore.cli.options import Commands, add_command


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "info", run, "what is installed here, and what scoring a model will do",
        "Versions, and which kernels serve which device on this machine, or why they do not.\n"
        "For a model: what is made of it to score it, layer by layer.",
        "fastscore info\nfastscore info --json\nfastscore info torchvision:resnet18")
    options.add_model(command, optional=True)
    options.add_pixels(command)
    command.set_defaults(seed=0)
    options.add_json(command, "the facts")


def run(arguments: argparse.Namespace) -> None:
    """Print what is installed, or a model's plan."""
    from fastscore.cli import environment

    if arguments.model is None:
        facts = environment.facts()
        print(json.dumps(facts) if arguments.json else environment.table(facts))
        return
    prepare = options.preprocessing(arguments)
    scores = fastscore.score(options.model(arguments), [options.example(arguments, prepare)], progress=False)
    print(json.dumps({"plan": str(scores.plan), "skipped": dict(scores.skipped)}) if arguments.json else scores.plan)
