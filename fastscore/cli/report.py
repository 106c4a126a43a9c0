"""fastscore report: one HTML file to look at in a browser, which holds all it needs and opens without a network."""

import argparse
import json
import shlex
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from fastscore import files
from fastscore.arguments import check_fraction
from fastscore.batches.calls import call_model
from fastscore.batches.parts import Batch
from fastscore.cli import images, models, options
from fastscore.cli.argument_types import positive, share
from fastscore.cli.parsers import Commands, add_command
from fastscore.cli.written import check_out, wrote
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.pruning.budgets.costs import Costs, Resource
from fastscore.pruning.budgets.selection import check_removable, scored_graph, totals_along
from fastscore.pruning.options import Budgets, Ranking, resolve_compensate
from fastscore.pruning.order.ranking import rank
from fastscore.recovery.divergence import judged_by
from fastscore.scoring.scores import Scores

_WEIGHTS = ("model", "checkpoint", "weights", "revision")  # notes that say which network it is
_GRADIENTS = {"random": "random, no labels", "loss": "of the loss", "none": "none: it reads weights"}


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "report", run, "SCORES [MODEL] ", "a page to look at scores in a browser",
        "Write scores as one HTML file that opens without a network: sortable layers, their importances, and which\n"
        "channels are removed at a budget. With the model, budgets are in MACs and parameters, too.",
        "fastscore report scores.safetensors --out scores.html\n"
        "fastscore report scores.safetensors torchvision:mobilenet_v2 --curve curve.json --out scores.html\n"
        "fastscore report scores.safetensors --fraction 0.5 --title 'ResNet-50, photos of May' --out scores.html")
    command.add_argument("scores", metavar="SCORES", help="scores from `fastscore score --out`")
    command.add_argument("model", metavar="MODEL", nargs="?", help="the model that was scored, for budgets in MACs and "
                         "parameters; no weights are needed")
    command.add_argument("--classes", type=positive, metavar="N", help="outputs of a torchvision or timm model")
    options.add_pixels(command)
    command.add_argument("--curve", metavar="JSON", help="what `fastscore curve --scores SCORES --out` measured: the "
                         "page then says it beside the budget")
    command.add_argument("--out", metavar="HTML", default="fastscore-report.html", help="default: %(default)s")
    command.add_argument("--fraction", type=share, default=0.3, metavar="SHARE",
                         help="share of the channels that the page shows as going at first (default: %(default)s)")
    command.add_argument("--title", default="Channel scores", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Read scores, write the page."""
    check_out(arguments)
    scores, costs = options.load_scores(arguments), None
    curve = None if arguments.curve is None else read_curve(arguments.curve, scores)
    if arguments.model is not None:
        prepare = images.preprocessing(arguments.model, None, arguments.size, arguments.mean, arguments.std)
        model = models.load(arguments.model, classes=arguments.classes)
        costs = removal_costs(model, scores, torch.zeros(2, *prepare.shape))
    write(scores, arguments.out, title=arguments.title, fraction=arguments.fraction, costs=costs,
          curve=curve, command=prune_command(scores, arguments.scores))
    wrote(arguments.out)


def prune_command(scores: Scores, path: str) -> str:
    """The command that prunes by these scores, but for its budget: the model is the one that the scores name."""
    known = scores.notes
    parts = ["fastscore", "prune", known.get("model", "MODEL")]
    if "checkpoint" in known:
        parts += ["--checkpoint", known["checkpoint"].rpartition(" (sha256 ")[0]]
    elif "weights" in known:
        parts += ["--weights", known["weights"]]
    images = ["--images", known["images"]] if "images" in known else []  # by which it is repaired
    return shlex.join([*parts, *known.get("options", "").split(), "--scores", path, *images])


def read_curve(path: str, scores: Scores) -> dict[str, Any]:
    """What `fastscore curve --out` wrote. Raises FileNotFoundError, or ValueError for what is none, or of another model
    or other scores."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"curve: there is no file {path}")
    other = "is not what fastscore curve --out writes: make it with fastscore curve --scores SCORES --out curve.json"
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        resource, notes, rows = found["resource"], found["notes"], found["rows"]
        right = resource in ("macs", "params", "channels") and all(row["cut_agreement"] <= 1 for row in rows) and \
            (found["decisions"] >= 1 or found.get("by_error") is True)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"curve: {path} {other}") from error
    if not right:
        raise ValueError(f"curve: {path} {other}")
    used = found.get("scores", notes)  # an older file has those of the scores alone
    for what, said, names in (("with other scores, whose", used, (*_WEIGHTS, "date")),
                              ("on another model, whose", notes, _WEIGHTS)):
        for name in names:
            if _told_apart(said.get(name)) != _told_apart(scores.notes.get(name)):
                raise ValueError(f"curve: {path} was measured {what} {name} is {said.get(name)} and not "
                                 f"{scores.notes.get(name)}; make it with fastscore curve --scores and these scores")
    return found


def _told_apart(note: str | None) -> str | None:
    """What tells one from another: of a file its hash, wherever it lies."""
    return None if note is None else note.rpartition(" (sha256 ")[2]


def removal_costs(model: nn.Module, scores: Scores, example_inputs: Batch) -> dict[str, Any]:
    """Budget's unit -> what remains, step by step, as fastscore.prune removes channels for a budget in that unit.

    Of each unit: dense, the whole network's MACs, parameters and channels; order, [(number of the layer among the
    scores, its channels)] of each step; remains, unit -> [what is left before the first step, after it, after the
    second, ...].

    Raises ValueError for scores of another model, or of BatchNorms alone.
    """
    check_removable(scores)
    graph = scored_graph(model, scores, example_inputs, call_model, ())
    copy, numbers, found = evaluation_copy(model), {layer: number for number, layer in enumerate(scores)}, {}
    for unit in get_args(Resource):
        costs = Costs(copy, graph.groups, example_inputs, compensate=resolve_compensate(None, scores),
                      kept_biases=graph.kept_biases)
        order = rank(copy, graph.groups, scores, costs, Budgets(**{unit: 0.5}), Ranking(), example_inputs, call_model)
        left = totals_along(order, costs)
        remains = {name: [totals[name] for totals in left] for name in costs.dense}
        found[unit] = {"dense": dict(costs.dense), "remains": remains,
                       "order": [(numbers[step.group], step.channels) for step in order]}
    return found


def write(scores: Scores, path: str | PathLike[str], *, title: str = "Channel scores", fraction: float = 0.3,
          costs: dict[str, Any] | None = None, curve: dict[str, Any] | None = None,
          command: str = "fastscore prune MODEL --scores FILE") -> None:
    """Write `scores` as a page: how they were made, a table of layers that can be sorted, each layer's importances.

    fraction: the share of channels that the page shows as going at first; a slider changes it. All layers are ranked
    together, and one channel stays in each. costs: of removal_costs, with which budgets are in MACs and parameters,
    too. curve: of read_curve; what it measured is said beside the budget. command: shown with the chosen budget behind
    it.

    Raises ValueError for a fraction outside [0, 1), FileNotFoundError for a folder that is not there.
    """
    check_fraction(fraction)
    page = resources.files("fastscore.cli").joinpath("report.html").read_text(encoding="utf-8")
    # "</script>" in a layer's name would end the data
    if curve is not None:
        curve = curve | {"judged": judged_by(curve["decisions"], "no repair has seen", curve.get("mixed", ""))}
    held = _data(scores, title, fraction) | {"costs": costs, "curve": curve, "command": command}
    data = json.dumps(held, ensure_ascii=True).replace("<", "\\u003c")
    with files.whole(path) as part:
        part.write_text(page.replace("__DATA__", data), encoding="utf-8")


def _data(scores: Scores, title: str, fraction: float) -> dict[str, Any]:
    origin = scores.origin
    layers = [{"name": layer, "values": [float(f"{value:.9g}") for value in values.tolist()]}
              for layer, values in scores.items()]
    facts = {"importance": origin.importance, "reduction": origin.reduction, "ablation": origin.ablation,
             "gradient": _GRADIENTS[origin.gradient], "normalized": "yes" if origin.normalize else "no",
             "units": origin.units, "samples": f"{scores.samples:,}", "seed": str(origin.seed)}
    if origin.gradient == "none":
        facts = {name: facts[name] for name in ("importance", "gradient", "seed")}
    if scores.coverage is not None:
        first, *rest = scores.coverage.lines()
        facts["coverage"] = "; ".join([first.removeprefix("coverage: "), *map(str.strip, rest)])
    facts |= {"rows": "; ".join(scores.row_notes)} if scores.row_notes else {}
    facts |= scores.notes
    return {"title": title, "facts": list(facts.items()), "fraction": fraction, "layers": layers,
            "skipped": list(scores.skipped.items())}
