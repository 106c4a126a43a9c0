"""fastscore prune."""

import argparse
import json
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

import fastscore
from fastscore.cli import options, repair_time
from fastscore.cli.argument_types import positive_or_auto, share
from fastscore.cli.options import tell
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.cli.written import check_out, wrote
from fastscore.pruning.budgets import clocks
from fastscore.pruning.budgets.clocks import Clock
from fastscore.pruning.budgets.quality import TOLERANCE, Quality
from fastscore.pruning.options import Budgets, Ranking, multiple
from fastscore.pruning.report import PruneReport
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved.checkpoint import save_pruned
from fastscore.pruning.saved.export import save
from fastscore.recovery.divergence import judged_by, mixed_of, names
from fastscore.wording import said


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "prune", run, "MODEL --images FOLDER --macs SHARE --out FILE ", "write a smaller model",
        "Remove the least important channels until a budget holds, and write what remains.",
        "fastscore prune torchvision:mobilenet_v2 --weights DEFAULT --scores scores.safetensors --macs 0.7 "
        "--out small.pt2\n"
        "fastscore prune nets.py:build --checkpoint net.safetensors --images photos --size 64 --params 0.5 "
        "--out small.onnx\n"
        "fastscore prune torchvision:mobilenet_v2 --weights DEFAULT --images photos --agreement 0.98 "
        "--out small.safetensors\n"
        "fastscore prune torchvision:resnet50 --checkpoint resnet.pth --importance magnitude-l2 --channels 0.8 "
        "--out small.safetensors")
    options.add_model(command)
    budget = command.add_argument_group("budget (one or more: the share that REMAINS, above 0 and up to 1; or "
                                        "--agreement)")
    for unit, text in (("macs", "multiply-accumulates"), ("params", "parameters"), ("channels", "channels"),
                       ("latency", "time that two images take, measured here")):
        budget.add_argument(f"--{unit}", type=share, metavar="SHARE", help=f"share of the {text}")
    budget.add_argument("--clock", choices=get_args(Clock), default="torch",
                        help="the runtime in which --latency is measured; the last two on the CPU (default: "
                        "%(default)s)")
    budget.add_argument("--agreement", type=share, metavar="SHARE",
                        help="instead of a budget: the smallest model that agrees with the dense one on this share of "
                        "images, judged on some that do not repair it")
    budget.add_argument("--confidence", type=share, metavar="P",
                        help="such as 0.95: with this probability, --agreement holds beyond the images that judge")
    command.add_argument("--scores", metavar="FILE", help="scores from `fastscore score --out`; otherwise scored now")
    options.add_scoring(command)
    options.add_repair(command)
    command.add_argument("--scope", choices=("global", "layer", "isomorphic"), default="global",
                         help="global: the least important channels of all layers go; layer: all layers shrink alike; "
                         "isomorphic: as global, among layers of one kind (default: %(default)s)")
    command.add_argument("--cost-aware", action=argparse.BooleanOptionalAction,
                         help="rank by importance per MAC (or parameter, or second; default: with such a budget, where "
                         "the importance reads gradients)")
    command.add_argument("--round-to", type=positive_or_auto, metavar="N",
                         help="make widths multiples of N; auto: of what this device runs fastest (default: auto where "
                         "--clock is not torch, else 1)")
    command.add_argument("--floor", type=share, default=0.0, metavar="SHARE",
                         help="share of each layer's channels that stays, whatever the budget (default: one channel)")
    command.add_argument("--compensate", action=argparse.BooleanOptionalAction,
                         help="add what removed channels gave on average to the biases of the layers that read them "
                         "(default: where the scores hold that average)")
    command.add_argument("--out", metavar="FILE", required=True,
                         help="the smaller model: .safetensors (weights and a recipe, for fastscore.load_pruned: to "
                         "fine-tune), .pt2 (torch.export), .onnx, or .pt (the module itself, as a pickle)")
    add_json(command, "the report")


def run(arguments: argparse.Namespace) -> None:
    """Score where there are no scores yet, prune, print, write."""
    budgets = Budgets(**{name: getattr(arguments, name) for name in ("channels", "params", "macs", "latency")})
    if not budgets.given and arguments.agreement is None:
        raise ValueError("budget: name what is to remain: --macs 0.7, --params, --channels or --latency, or "
                         "--agreement 0.98 for as little as will do")
    Quality(arguments.agreement, None, arguments.confidence).alone(budgets, True)  # before minutes of work
    Ranking(arguments.scope, arguments.cost_aware, multiple(arguments.round_to, arguments.latency, arguments.clock),
            arguments.floor)
    check_out(arguments)
    scores = None if arguments.scores is None else options.load_scores(arguments)
    prepare = options.preprocessing(arguments)
    model = options.model(arguments, prepare)
    clocks.check(arguments.clock, arguments.latency, model, options.example(arguments, prepare))
    repair: dict[str, Any] = {}
    work = None
    if options.repairs(arguments):
        work, judges = options.image_batches(arguments, prepare, arguments.agreement is not None, scores)
        repair = {"calibration": work, "repair": arguments.repair, "held_out": judges,
                  "outputs": options.judged(arguments)}
    elif arguments.agreement is not None:
        raise ValueError("agreement: it is judged on images, and by repaired models: give --images FOLDER, and neither "
                         "--no-repair nor --no-compensate")
    if scores is None:
        scores = options.scored(model, arguments, prepare, work)
    else:
        scores = replace(scores, notes=options.notes(arguments, prepare, scores))
    repaired_on = f"{arguments.images}: {prepare}"
    if repair and repaired_on != f"{scores.notes.get('images')}: {scores.notes.get('preprocessing')}":
        tell(f"repaired on {repaired_on}")  # not on what was scored
        scores = replace(scores, notes={**scores.notes, "repaired on": repaired_on})
    if work is not None:
        networks = 1 if arguments.agreement is None else round(-math.log2(TOLERANCE))  # by bisection
        repair_time.tell(model, work, arguments, networks, len(scores) if arguments.scope == "global" else 0)
    example = options.example(arguments, prepare)
    asked = {name: getattr(arguments, name) for name in (
        "channels", "params", "macs", "latency", "agreement", "confidence", "scope", "clock", "cost_aware", "round_to",
        "floor", "compensate", "measured", "ignore")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "agreement: ")  # the report has it
        result = fastscore.prune(model, scores, example, **repair, **asked)
    print(json.dumps(asdict(result.report)) if arguments.json else result.report)
    if arguments.json and "agreement" in result.report.notes:
        tell(f"agreement: {result.report.notes['agreement']}")
    _tell_quality(result.report)
    _save(result, example, arguments.out)
    wrote(arguments.out)


def _save(result: PruneResult, example: Tensor, out: str) -> None:
    """Write the smaller model; as weights and a recipe, and raise ValueError, where an exporter does not take it."""
    try:
        save(result, example, out)
    except Exception as error:  # of PyTorch's exporters, which have no class in common
        if isinstance(error, OSError) or Path(out).suffix == ".safetensors":
            raise
        kept = f"{out}.safetensors"  # what was found may have taken an hour
        save_pruned(result, kept)
        raise ValueError(f"--out: {out} could not be written ({said(error)}); the smaller model is in {kept}, which "
                         "fastscore.load_pruned reads") from error


def _tell_quality(report: PruneReport) -> None:
    """How near the smaller model is to the dense one: as a quality budget was judged, or else as its repair was."""
    before, after = (report.repairs or (None,))[0], next((row for row in report.repairs if row.chosen), None)
    if (held := report.held) is not None:
        (agreement, kl), judged = names(held.by_error, held.mixed), judged_by(held.decisions, "no repair has seen",
                                                                              held.mixed, bool(held.least))
        tell(f"{agreement} with the dense model: {held.agreement:.1%}{held.least} ({kl} {held.kl:.3g}), {judged}")
    elif before is not None and after is not None:
        mixed = mixed_of((before.mixed, after.mixed))
        (agreement, kl), judged = names(after.by_error, mixed), judged_by(after.decisions, "it is not fitted to", mixed)
        tell(f"{agreement} with the dense model: " + (
            f"{after.agreement:.1%} as it was cut ({kl} {after.kl:.3g}), which no repair bettered; {judged}"
            if after is before else
            f"{before.agreement:.1%} before the repair, {after.agreement:.1%} after it "
            f"({kl} {before.kl:.3g}, {after.kl:.3g}), {judged}"))
