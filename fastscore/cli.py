"""The command line: fastscore demo | score | prune | info."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

import fastscore
from fastscore import images, models, plots
from fastscore.importance import NAMES, WEIGHT_IMPORTANCES
from fastscore.scores import Scores

# A random gradient has mean zero, and with it the signed `taylor`: only noise would remain.
IMPORTANCES = [name for name in NAMES if name != "taylor"]

EXAMPLES = """examples:
  fastscore demo
  fastscore score torchvision:mobilenet_v2 --weights DEFAULT --images photos --out scores.safetensors
  fastscore prune torchvision:mobilenet_v2 --weights DEFAULT --scores scores.safetensors --macs 0.7 --out small.pt2
  fastscore prune nets.py:build --checkpoint net.safetensors --images photos --size 64 --params 0.5 --out small.onnx
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(2, f"fastscore: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for input that cannot be used (one line on stderr).

    What fastscore did not raise itself (an error inside the user's model, say) keeps its traceback.
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, FloatingPointError, ImportError, OSError) as error:
        if not _raised_here(error):
            raise
        text = "; ".join(line.strip() for line in str(error).splitlines())
        print(f"fastscore: error: {text}", file=sys.stderr)
        return 2
    return 0


def _raised_here(error: BaseException) -> bool:
    """Whether the error comes from a line of fastscore's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def parser() -> Parser:
    """Every command and option."""
    top = Parser("fastscore", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
                 description="Which channels of a trained network matter, without labels, and a smaller network "
                 "without the rest.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, score, prune and fine-tune a small network: about a minute",
                               description="Train small networks on scikit-learn's digits, prune them to half "
                               "their MACs by fastscore, by magnitude and at random, fine-tune briefly, and compare.")
    demo.add_argument("--out", metavar="PNG", default="fastscore-demo.png", help="the plot (default: %(default)s)")
    demo.add_argument("--networks", type=_positive, default=5, metavar="N",
                      help="networks to train and average, each with a split of its own (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the first network (default: %(default)s)")
    demo.set_defaults(run=_demo)

    score = commands.add_parser("score", help="score every channel of a model on unlabelled images",
                                description="Score every channel of a model on a folder of unlabelled images.")
    _add_model(score)
    _add_scoring(score, score)
    score.add_argument("--out", metavar="FILE", help="write the scores: a safetensors file, for prune --scores")
    score.add_argument("--plot", metavar="PNG", help="draw each layer's scores")
    score.add_argument("--json", action="store_true", help="print the scores as JSON instead of a table")
    score.set_defaults(run=_score)

    prune = commands.add_parser("prune", help="write a smaller model",
                                description="Remove the least important channels until a budget holds, and write what "
                                "remains.")
    _add_model(prune)
    budget = prune.add_argument_group("budget (one or more: the share that REMAINS, above 0 and up to 1)")
    for unit, text in (("macs", "multiply-accumulates"), ("params", "parameters"), ("channels", "channels")):
        budget.add_argument(f"--{unit}", type=float, metavar="SHARE", help=f"share of the {text}")
    source = prune.add_mutually_exclusive_group()
    source.add_argument("--scores", metavar="FILE", help="scores from `fastscore score --out`; otherwise scored now")
    _add_scoring(prune, source)
    prune.add_argument("--scope", choices=("global", "layer"), default="global",
                       help="compare channels of all layers, or shrink all layers alike (default: %(default)s)")
    prune.add_argument("--round-to", type=_positive, default=1, metavar="N", help="remaining widths are multiples of N")
    prune.add_argument("--floor", type=float, default=0.0, metavar="SHARE",
                       help="share of each layer's channels that stays")
    prune.add_argument("--out", metavar="FILE", required=True,
                       help="the smaller model: .pt2 (torch.export), .onnx, or .pt (the module itself, to fine-tune)")
    prune.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    prune.set_defaults(run=_prune)

    info = commands.add_parser("info", help="versions, and the backends of the kernels on this machine")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    model.add_argument("model", metavar="MODEL", help="torchvision:NAME, or module:function for a function that "
                       "returns a torch.nn.Module (the module is a name on the Python path or a .py file)")
    weights = model.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="state dict: safetensors, or torch.save")
    weights.add_argument("--weights", metavar="NAME", help="torchvision's weights, e.g. DEFAULT (downloaded)")
    model.add_argument("--classes", type=_positive, metavar="N",
                       help="outputs of a torchvision model (default: its own)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def _add_scoring(command: argparse.ArgumentParser, folder: argparse._ActionsContainer) -> None:
    folder.add_argument("--images", metavar="FOLDER", help="unlabelled images, subfolders included")
    scoring = command.add_argument_group("scoring")
    scoring.add_argument("--importance", choices=IMPORTANCES, default="taylor-sq", help="default: %(default)s")
    scoring.add_argument("--reduction", choices=("sum", "element"), default="sum",
                         help="over a channel's positions before the square or absolute value (default: %(default)s)")
    scoring.add_argument("--probes", type=_positive, default=1, metavar="N", help="random gradients for each image")
    scoring.add_argument("--samples", type=_positive, metavar="N", help="draw N of the images (default: all)")
    scoring.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    scoring.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    scoring.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="LAYER",
                         help="layers to leave alone, by name; * and ? are wildcards")
    pixels = command.add_argument_group("preprocessing (default: that of torchvision's weights)")
    pixels.add_argument("--size", type=_positive, metavar="PIXELS", help="of the square that the model sees")
    pixels.add_argument("--mean", type=float, nargs="+", metavar="X", help="3 numbers, or 1 for grey images")
    pixels.add_argument("--std", type=float, nargs="+", metavar="X")


def _demo(arguments: argparse.Namespace) -> None:
    from fastscore import demo, demo_plot

    _check_folder(arguments.out)
    plots.check(arguments.out)
    result = demo.run(arguments.networks, arguments.seed)
    print(result)
    demo_plot.draw(result, arguments.out)
    _wrote(arguments.out)


def _score(arguments: argparse.Namespace) -> None:
    _check_folder(arguments.out, arguments.plot)
    if arguments.plot is not None:
        plots.check(arguments.plot)
    prepare = _preprocessing(arguments)
    scores = _scored(_model(arguments), arguments, prepare)
    print(json.dumps({"origin": asdict(scores.origin), "samples": scores.samples, "skipped": dict(scores.skipped),
                      "scores": {layer: values.tolist() for layer, values in scores.items()}})
          if arguments.json else scores)
    if arguments.out is not None:
        scores.save(arguments.out)
    if arguments.plot is not None:
        scores.plot(arguments.plot)
    _wrote(arguments.out, arguments.plot)


def _prune(arguments: argparse.Namespace) -> None:
    _check_folder(arguments.out)
    models.check_suffix(arguments.out)
    prepare = _preprocessing(arguments)
    model = _model(arguments)
    scores = Scores.load(arguments.scores) if arguments.scores is not None else _scored(model, arguments, prepare)
    example = _example(arguments, prepare)
    result = fastscore.prune(model, scores, example, channels=arguments.channels, params=arguments.params,
                             macs=arguments.macs, scope=arguments.scope, round_to=arguments.round_to,
                             floor=arguments.floor, ignore=arguments.ignore)
    models.save(result.model, example, arguments.out)
    print(json.dumps(asdict(result.report)) if arguments.json else result.report)
    _wrote(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    from fastscore import info

    facts = info.facts()
    print(json.dumps(facts) if arguments.json else info.table(facts))


def _model(arguments: argparse.Namespace) -> nn.Module:
    if arguments.checkpoint is None and arguments.weights is None and arguments.model.startswith("torchvision:"):
        print("note: random weights; give --checkpoint or --weights for trained ones", file=sys.stderr)
    model = models.load(arguments.model, checkpoint=arguments.checkpoint, weights=arguments.weights,
                        classes=arguments.classes, seed=arguments.seed)
    return model.to(_device(arguments))


def _device(arguments: argparse.Namespace) -> torch.device:
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from error


def _preprocessing(arguments: argparse.Namespace) -> images.Preprocessing:
    return images.preprocessing(arguments.model, arguments.weights, arguments.size, arguments.mean, arguments.std)


def _scored(model: nn.Module, arguments: argparse.Namespace, prepare: images.Preprocessing) -> Scores:
    """Scores from the folder of images; from the weights alone where the importance asks for no more."""
    if arguments.importance in WEIGHT_IMPORTANCES:
        return fastscore.score(model, [_example(arguments, prepare)], importance=arguments.importance,
                               seed=arguments.seed, ignore=arguments.ignore)
    if arguments.images is None:
        raise ValueError(f"images: {arguments.importance} needs a folder of them; give --images FOLDER")
    paths = images.find(arguments.images, arguments.samples, arguments.seed)
    return fastscore.score(model, images.batches(paths, prepare, arguments.batch_size), importance=arguments.importance,
                           reduction=arguments.reduction, probes=arguments.probes, samples=len(paths),
                           seed=arguments.seed, ignore=arguments.ignore)


def _example(arguments: argparse.Namespace, prepare: images.Preprocessing) -> Tensor:
    return torch.zeros(2, *prepare.shape, device=_device(arguments))


def _check_folder(*paths: str | None) -> None:
    """Raise ValueError, before any work, for a file to write in a folder that is not there."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no folder {Path(path).parent} to write it in")


def _wrote(*paths: str | None) -> None:
    for path in paths:
        if path is not None:
            print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.2f} MB)", file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: it must be 1 or more")
    return value
