"""fastscore curve."""

import argparse
import json
from typing import Any

import fastscore
from fastscore import files
from fastscore.cli import options, repair_time
from fastscore.cli.argument_types import share
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.cli.written import check_out, wrote
from fastscore.pruning.curve import budgets_of
from fastscore.pruning.options import Budgets


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "curve", run, "MODEL --images FOLDER ",
        "how much can go: budget against agreement with the dense model",
        "Prune to several budgets, repair, and say how often each smaller model decides as the dense one does, on\n"
        "images that neither scored nor repaired.",
        "fastscore curve torchvision:mobilenet_v2 --weights DEFAULT --images photos\n"
        "fastscore curve nets.py:build --checkpoint net.safetensors --images photos --size 64 --macs 0.9 0.7 0.5 "
        "--plot curve.png\n"
        "fastscore curve torchvision:mobilenet_v2 --weights DEFAULT --scores s.safetensors --images photos "
        "--out curve.json")
    options.add_model(command)
    command.add_argument("--scores", metavar="FILE", help="scores from `fastscore score --out`; otherwise scored now")
    options.add_scoring(command)
    add_budgets(command)
    options.add_repair(command)
    command.add_argument("--plot", metavar="PNG", help="draw it")
    command.add_argument("--out", metavar="JSON", help="write it, for `fastscore report --curve`")
    add_json(command, "the rows")


def add_budgets(command: argparse.ArgumentParser) -> None:
    """Shares that remain, of one resource."""
    budget = command.add_mutually_exclusive_group()
    for resource, text in (("macs", "multiply-accumulates (default: 0.9 0.8 0.7 0.6 0.5)"), ("params", "parameters"),
                           ("channels", "channels")):
        budget.add_argument(f"--{resource}", type=share, nargs="+", metavar="SHARE", help=f"of the {text}")


def budgets(arguments: argparse.Namespace) -> dict[str, Any]:
    """Resource -> shares. Raises ValueError for one that is none."""
    found = {name: getattr(arguments, name) for name in ("macs", "params", "channels")}
    for name, shares in found.items():
        for each in shares or ():
            Budgets(**{name: each})
    return found


def run(arguments: argparse.Namespace) -> None:
    """Score where there are no scores yet, prune to each budget, print, draw."""
    asked = budgets(arguments)
    check_out(arguments)
    scores = None if arguments.scores is None else options.load_scores(arguments)
    prepare = options.preprocessing(arguments)
    work, judges = options.image_batches(arguments, prepare, True, scores)
    model = options.model(arguments, prepare)
    if scores is None:
        scores = options.scored(model, arguments, prepare, work)
    repair_time.tell(model, work, arguments, len(budgets_of(*asked.values())[1]), len(scores))
    found = fastscore.curve(model, scores, work, **asked, held_out=judges, repair=arguments.repair,
                            measured=arguments.measured, ignore=arguments.ignore, outputs=options.judged(arguments))
    print(json.dumps(found.records()) if arguments.json else found)
    if arguments.plot is not None:
        found.plot(arguments.plot)
    if arguments.out is not None:
        notes = scores.notes if arguments.scores is None else options.notes(arguments, prepare, scores)
        kept = {"resource": found.resource, "decisions": found.decisions, "by_error": found.by_error,
                "mixed": found.mixed, "note": found.note, "notes": dict(notes), "scores": dict(scores.notes),
                "rows": found.records()}
        with files.whole(arguments.out) as part:
            part.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    wrote(arguments.plot, arguments.out)
