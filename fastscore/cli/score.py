"""fastscore score."""

import argparse
import json
from dataclasses import asdict

from fastscore import plots
from fastscore.cli import options
from fastscore.cli.options import Commands, add_command


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "score", run, "score every channel of a model on unlabelled images",
        "Score every channel of a model on a folder of unlabelled images.",
        "fastscore score torchvision:mobilenet_v2 --weights DEFAULT --images photos --out scores.safetensors\n"
        "fastscore score nets.py:build --checkpoint net.safetensors --images photos --size 64 --plot scores.png\n"
        "fastscore score torchvision:resnet50 --checkpoint resnet.pth --images photos --samples auto --json\n"
        "fastscore score torchvision:resnet50 --checkpoint resnet.pth --images photos --probes 4 "
        "--distribution orthogonal")
    options.add_model(command)
    options.add_scoring(command, command)
    command.add_argument("--out", metavar="FILE", help="write the scores: a safetensors file, for prune --scores")
    command.add_argument("--plot", metavar="PNG", help="draw each layer's scores")
    options.add_json(command, "the scores")


def run(arguments: argparse.Namespace) -> None:
    """Score, print, write."""
    options.check_folder(arguments.out, arguments.plot)
    if arguments.plot is not None:
        plots.check(arguments.plot)
    prepare = options.preprocessing(arguments)
    scores = options.scored(options.model(arguments), arguments, prepare)
    print(json.dumps({"origin": asdict(scores.origin), "samples": scores.samples, "skipped": dict(scores.skipped),
                      "scores": {layer: values.tolist() for layer, values in scores.items()}})
          if arguments.json else scores)
    if arguments.out is not None:
        scores.save(arguments.out)
    if arguments.plot is not None:
        scores.plot(arguments.plot)
    options.wrote(arguments.out, arguments.plot)
