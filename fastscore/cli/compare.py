"""fastscore compare."""

import argparse
import json

import fastscore
from fastscore.cli import options, repair_time
from fastscore.cli.argument_types import IMPORTANCES, importance, positive
from fastscore.cli.curve import add_budgets, budgets
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.cli.written import check_out, wrote


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "compare", run, "MODEL --images FOLDER ",
        "which criterion ranks best, at equal budgets, all repaired alike",
        "Score by several criteria, prune to the same budgets, repair all alike, and say how often each smaller model\n"
        "decides as the dense one does, on images that neither scored nor repaired.",
        "fastscore compare torchvision:mobilenet_v2 --weights DEFAULT --images photos --macs 0.85 0.7\n"
        "fastscore compare nets.py:build --checkpoint net.safetensors --images photos --size 64 "
        "--importances taylor-sq taylor-abs random --plot compared.png")
    options.add_model(command)
    command.add_argument("--images", metavar="FOLDER", required=True, help="unlabelled images, subfolders included")
    command.add_argument("--importances", nargs="+", type=importance, metavar="NAME",
                         default=["taylor-sq", "magnitude-l2", "random"],
                         help=f"of {', '.join(IMPORTANCES)} (default: taylor-sq magnitude-l2 random)")
    command.add_argument("--samples", type=positive, metavar="N", help="draw N of the images (default: all)")
    options.add_reading(command)
    add_budgets(command)
    options.add_repair(command)
    options.add_pixels(command)
    command.add_argument("--plot", metavar="PNG", help="draw it")
    add_json(command, "the rows")


def run(arguments: argparse.Namespace) -> None:
    """Score by each criterion, prune to each budget, print, draw."""
    asked = budgets(arguments)
    if not any(asked.values()):
        asked["macs"] = [0.9, 0.8, 0.7, 0.6, 0.5]
    check_out(arguments)
    prepare = options.preprocessing(arguments)
    work, judges = options.image_batches(arguments, prepare, judges=True)
    options.tell(f"images: {prepare}")
    model = options.model(arguments, prepare)
    repair_time.tell(model, work, arguments, len(arguments.importances) * len(next(filter(None, asked.values()))))
    found = fastscore.compare(model, work, arguments.importances,
                              **asked, held_out=judges, repair=arguments.repair,
                              seed=arguments.seed, measured=arguments.measured, ignore=arguments.ignore,
                              outputs=options.judged(arguments))
    print(json.dumps(found.records()) if arguments.json else found)
    if arguments.plot is not None:
        found.plot(arguments.plot)
    wrote(arguments.plot)
