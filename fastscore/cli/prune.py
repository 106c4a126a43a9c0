"""fastscore prune."""

import argparse
import json
from dataclasses import asdict

import fastscore
from fastscore.cli import options
from fastscore.cli.options import Commands, add_command, positive_or
from fastscore.pruning.export import check_suffix, save
from fastscore.scoring.scores import Scores


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "prune", run, "write a smaller model",
        "Remove the least important channels until a budget holds, and write what remains.",
        "fastscore prune torchvision:mobilenet_v2 --weights DEFAULT --scores scores.safetensors --macs 0.7 "
        "--out small.pt2\n"
        "fastscore prune nets.py:build --checkpoint net.safetensors --images photos --size 64 --params 0.5 "
        "--out small.onnx\n"
        "fastscore prune torchvision:resnet50 --checkpoint resnet.pth --importance magnitude-l2 --channels 0.8 "
        "--out small.safetensors")
    options.add_model(command)
    budget = command.add_argument_group("budget (one or more: the share that REMAINS, above 0 and up to 1)")
    for unit, text in (("macs", "multiply-accumulates"), ("params", "parameters"), ("channels", "channels"),
                       ("latency", "time that two images take, measured here")):
        budget.add_argument(f"--{unit}", type=float, metavar="SHARE", help=f"share of the {text}")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--scores", metavar="FILE", help="scores from `fastscore score --out`; otherwise scored now")
    options.add_scoring(command, source)
    command.add_argument("--scope", choices=("global", "layer", "isomorphic"), default="global",
                         help="compare channels of all layers, shrink all layers alike, or compare channels of layers "
                         "of one kind (default: %(default)s)")
    command.add_argument("--cost-aware", action="store_true", help="rank by importance per MAC (or parameter)")
    command.add_argument("--round-to", type=positive_or("auto"), default=1, metavar="N",
                         help="remaining widths are multiples of N; auto: of what the device likes")
    command.add_argument("--floor", type=float, default=0.0, metavar="SHARE",
                         help="share of each layer's channels that stays")
    command.add_argument("--compensate", action=argparse.BooleanOptionalAction,
                         help="add what removed channels gave on average to the biases of the layers that read them "
                         "(default: where the scores hold that average)")
    command.add_argument("--out", metavar="FILE", required=True,
                         help="the smaller model: .safetensors (weights and a recipe, for fastscore.load_pruned: to "
                         "fine-tune), .pt2 (torch.export), .onnx, or .pt (the module itself, as a pickle)")
    options.add_json(command, "the report")


def run(arguments: argparse.Namespace) -> None:
    """Score where there are no scores yet, prune, print, write."""
    options.check_folder(arguments.out)
    check_suffix(arguments.out)
    prepare = options.preprocessing(arguments)
    model = options.model(arguments)
    scores = Scores.load(arguments.scores) if arguments.scores is not None else \
        options.scored(model, arguments, prepare)
    example = options.example(arguments, prepare)
    result = fastscore.prune(model, scores, example,
                             **{name: getattr(arguments, name) for name in
                                ("channels", "params", "macs", "latency", "scope", "cost_aware", "round_to", "floor",
                                 "compensate", "ignore")})
    save(result, example, arguments.out)
    print(json.dumps(asdict(result.report)) if arguments.json else result.report)
    options.wrote(arguments.out)
