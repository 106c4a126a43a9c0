"""fastscore info."""

import argparse
import json

from fastscore.cli.options import Commands, add_command, add_json


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(commands, "info", run, "versions, and the backends of the kernels on this machine",
                          "Versions, and which kernels serve which device on this machine, or why they do not.",
                          "fastscore info\nfastscore info --json")
    add_json(command, "the facts")


def run(arguments: argparse.Namespace) -> None:
    """Print what is installed."""
    from fastscore import info

    facts = info.facts()
    print(json.dumps(facts) if arguments.json else info.table(facts))
