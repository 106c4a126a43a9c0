"""fastscore report: one HTML file to look at in a browser, which holds all it needs and opens without a network."""

import argparse
import json
from dataclasses import asdict
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from fastscore.cli.options import Commands, add_command, check_folder, wrote
from fastscore.pruning.report import PruneReport
from fastscore.scoring.scores import Scores

_GRADIENTS = {"random": "random, no labels", "loss": "of the loss", "none": "none: it reads weights"}


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "report", run, "a page to look at scores in a browser",
        "Write scores as one HTML file that opens without a network: sortable layers, their importances, and which\n"
        "channels would go at a budget.",
        "fastscore report scores.safetensors --out scores.html\n"
        "fastscore report scores.safetensors --fraction 0.5 --title 'ResNet-50, photos of May' --out scores.html")
    command.add_argument("scores", metavar="SCORES", help="scores from `fastscore score --out`")
    command.add_argument("--out", metavar="HTML", default="fastscore-report.html", help="default: %(default)s")
    command.add_argument("--fraction", type=float, default=0.3, metavar="SHARE",
                         help="share of the channels that the page shows as going at first (default: %(default)s)")
    command.add_argument("--title", default="Channel scores", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Read scores, write the page."""
    check_folder(arguments.out)
    write(Scores.load(arguments.scores), arguments.out, title=arguments.title, fraction=arguments.fraction)
    wrote(arguments.out)


def write(scores: Scores, path: str | PathLike[str], *, title: str = "Channel scores", fraction: float = 0.3,
          pruned: PruneReport | None = None) -> None:
    """Write `scores` as a page: how they were made, a table of layers that can be sorted, each layer's importances.

    fraction: the share of channels that the page shows as going at first; a slider changes it. All layers are ranked
    together, and one channel stays in each. pruned: what prune() reported, as a second table.

    Raises ValueError for a fraction outside [0, 1), FileNotFoundError for a folder that is not there.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction}; it is the share of channels that would go, 0 <= fraction < 1")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}; make it first")
    page = resources.files("fastscore.cli").joinpath("report.html").read_text(encoding="utf-8")
    # "</script>" in a layer's name would end the data
    data = json.dumps(_data(scores, title, fraction, pruned), ensure_ascii=True).replace("<", "\\u003c")
    Path(path).write_text(page.replace("__DATA__", data), encoding="utf-8")


def _data(scores: Scores, title: str, fraction: float, pruned: PruneReport | None) -> dict[str, Any]:
    origin = scores.origin
    layers = [{"name": layer, "values": [float(f"{value:.9g}") for value in values.tolist()]}
              for layer, values in scores.items()]
    facts = {"importance": origin.importance, "reduction": origin.reduction, "ablation": origin.ablation,
             "gradient": _GRADIENTS[origin.gradient], "normalized": "yes" if origin.normalize else "no",
             "units": origin.units, "samples": f"{scores.samples:,}", "seed": str(origin.seed)}
    if origin.gradient == "none":
        facts = {name: facts[name] for name in ("importance", "gradient", "seed")}
    facts |= scores.notes
    return {"title": title, "facts": list(facts.items()), "fraction": fraction,
            "layers": layers,
            "skipped": list((scores.skipped if pruned is None else pruned.skipped).items()),
            "pruned": None if pruned is None else {
                "channels": pruned.channels, "macs": pruned.macs, "params": pruned.params,
                "groups": [asdict(group) for group in pruned.groups]}}
