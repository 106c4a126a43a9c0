"""Options that several commands have, and what becomes of them: a model, its images, its scores."""

import argparse
import itertools
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import fastscore
from fastscore.cli import hugging_face, images, models, processes, units
from fastscore.cli.argument_types import IMPORTANCES, importance, of_sampling, positive, removable_units
from fastscore.cli.checkpoints import noted_weights, sha256
from fastscore.cli.parsers import Parser
from fastscore.fastpath.precision import PRECISIONS
from fastscore.recovery.decisions import Judging
from fastscore.recovery.reconstruct import Method
from fastscore.scoring.criteria import ABLATIONS, GRADIENT_IMPORTANCES, LAYERWISE, REDUCTIONS
from fastscore.scoring.gradients import DISTRIBUTIONS
from fastscore.scoring.scores import Scores
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

_OF_THE_IMAGES = ("images", "preprocessing")  # notes that say what was scored, and not what model it was
_OF_THE_MODEL = ("size", "classes", "mean", "std")  # options that every command on one model needs

class _Repair(argparse.Action):
    """--repair; none stands for --no-repair."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        setattr(namespace, self.dest, None if values == "none" else values)


def add_model(command: argparse.ArgumentParser, optional: bool = False) -> None:
    """Which model, which weights, which device."""
    model = command.add_argument_group("model")
    model.add_argument("model", metavar="MODEL", nargs="?" if optional else None,
                       help="torchvision:NAME, timm:NAME, hf:NAME or hf:FOLDER (transformers' image classifiers), or "
                       "module:function for a function that returns a torch.nn.Module (the module is a name on the "
                       "Python path or a .py file)")
    weights = model.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="your weights: a state dict, safetensors or torch.save")
    weights.add_argument("--weights", metavar="NAME", help="torchvision's or timm's weights, e.g. DEFAULT (downloaded)")
    model.add_argument("--classes", type=positive, metavar="N",
                       help="outputs of a torchvision or timm model (default: its own)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_scoring(command: argparse.ArgumentParser) -> None:
    """How to score, and on which images."""
    command.add_argument("--images", metavar="FOLDER", help="unlabelled images, subfolders included")
    scoring = command.add_argument_group("scoring")
    scoring.add_argument("--importance", type=importance, default="taylor-sq", metavar="NAME",
                         help=f"{', '.join(IMPORTANCES)} (default: %(default)s); the signed taylor needs a loss, which "
                         "fastscore.Scorer takes")
    add_units(scoring)
    scoring.add_argument("--reduction", choices=REDUCTIONS, default="sum",
                         help="sum a channel's positions before the square or absolute value is taken, or take it of "
                         "each element (default: %(default)s)")
    scoring.add_argument("--ablation", choices=ABLATIONS,
                         help="what stands in for a removed channel: zero, or its mean (default: mean where a repair "
                         "follows and the importance has it, else zero)")
    scoring.add_argument("--layerwise", choices=tuple(LAYERWISE), default="none",
                         help="divide each layer's scores by their norm or mean (default: %(default)s)")
    scoring.add_argument("--probes", type=of_sampling("probes"), default=1, metavar="N",
                         help="random gradients for each image; exact: one for each output (default: %(default)s)")
    scoring.add_argument("--distribution", choices=[name for name in DISTRIBUTIONS if name != "basis"],
                         default="normal", help="distribution of the random gradients (default: %(default)s)")
    scoring.add_argument("--center", action="store_true",
                         help="take the direction that a softmax does not see out of the random gradients")
    scoring.add_argument("--no-normalize", action="store_false", dest="normalize",
                         help="leave the gradients' lengths as drawn, instead of 1")
    scoring.add_argument("--samples", type=of_sampling("samples"), metavar="N",
                         help="draw N of the images; auto: as many as it takes for scores to settle (default: all)")
    add_reading(scoring)
    scoring.add_argument("--precision", choices=PRECISIONS, help="of the scoring passes (default: the model's)")
    scoring.add_argument("--compile", action="store_true", help="run the passes through torch.compile")
    add_pixels(command)


def add_reading(folder: argparse._ActionsContainer) -> None:
    """How images are read, whatever follows, and what of the model stays as it is."""
    folder.add_argument("--batch-size", type=positive, default=32, metavar="N",
                        help="images at once (default: %(default)s)")
    folder.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of every random choice (default: %(default)s)")
    folder.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="LAYER",
                        help="layers to keep as they are, by name; * and ? are wildcards")


def add_repair(command: argparse.ArgumentParser) -> None:
    """How a smaller model is repaired on the images."""
    repair = command.add_mutually_exclusive_group()
    repair.add_argument("--repair", choices=(*get_args(Method), "none"), default="auto", action=_Repair,
                        help="how the layers that are left take over from what went, fitted to --images (default: "
                        "auto, whichever does best on one of four images, held out); none: as --no-repair")
    repair.add_argument("--no-repair", action="store_const", const=None, dest="repair",
                        help="cut only; --images are then used for scoring alone")
    command.add_argument("--held-out", metavar="FOLDER", help="images that judge, and neither score nor repair "
                         "(default: one of four of --images)")
    command.add_argument("--outputs", choices=get_args(Judging), help="how the model's outputs are judged: decision, "
                         "by the largest (of a single one: by its sign), or error, by the squared error as a share of "
                         "their variance, for estimates and images (default: error for a single one, and after tanh, "
                         "sigmoid or normalize; else decision)")
    command.add_argument("--measured", action=argparse.BooleanOptionalAction,
                         help="before cutting, measure what a cut of each layer costs after repair, and compare layers "
                         "by that: better, and slower (default: with --repair auto and asymmetric, where possible)")


def judged(arguments: argparse.Namespace) -> dict[str, Judging] | None:
    """What --outputs says of the one tensor that a model returns here, as fastscore.prune takes it."""
    return None if arguments.outputs is None else {"": arguments.outputs}


def repairs(arguments: argparse.Namespace) -> bool:
    """Whether a smaller model is repaired: where there are images, and nobody forbids it."""
    asked = vars(arguments)
    return arguments.images is not None and asked.get("repair") is not None and asked.get("compensate") is not False


def ablation(arguments: argparse.Namespace) -> str:
    """What a channel's absence is compared with: its mean, which a repair gives back, where one follows."""
    has_mean = arguments.units == "groups" and \
        (arguments.importance, arguments.reduction, "mean") in GRADIENT_IMPORTANCES
    return arguments.ablation or ("mean" if has_mean and repairs(arguments) else "zero")


def image_batches(arguments: argparse.Namespace, prepare: images.Preprocessing, judges: bool,
                  scores: Scores | None = None) -> tuple[images.ImageBatches, images.ImageBatches | None]:
    """(images to score and repair with, images to judge by), in an order that is the same at every reading.

    judges: hold one of four images out to judge by. scores: those of a file, which may be of the same images. Raises
    ValueError without images.
    """
    if arguments.images is None:
        raise ValueError("images: they are needed here; give --images FOLDER")
    samples = None if arguments.samples == "auto" else arguments.samples
    paths = images.find(arguments.images, samples, arguments.seed)
    work, held_out = images.apart(paths, arguments.held_out) if judges else (paths, [])
    if repairs(arguments) and len(work) < 2:  # the second is held out
        cut_only = ", or --no-repair" if vars(arguments).get("agreement") is None else ""
        raise ValueError(f"images: {len(work)}, and a repair holds some out to choose by; give 2 or more{cut_only}")
    judges_from = arguments.held_out or arguments.images
    if judges and scores is not None and scores.notes.get("images") == str(judges_from):
        tell(f"{arguments.scores} was scored on {judges_from}, too, and so on the images that judge: networks "
             "look a little better than they are; leave --scores out, or give images of others")
    return (images.batches(work, prepare, arguments.batch_size, keep=True),
            images.batches(held_out, prepare, arguments.batch_size, keep=True) if judges else None)


def add_pixels(command: argparse.ArgumentParser) -> None:
    """What becomes of an image before the model sees it."""
    pixels = command.add_argument_group("preprocessing (default: that of the weights, or of hf's processor)")
    pixels.add_argument("--size", type=positive, metavar="PIXELS", help="side of the square that the model sees")
    pixels.add_argument("--mean", type=float, nargs="+", metavar="X",
                        help="subtracted from pixels in [0, 1]: 3 numbers, or 1 for grey images")
    pixels.add_argument("--std", type=float, nargs="+", metavar="X", help="and then divided by: as many")


def model(arguments: argparse.Namespace, prepare: images.Preprocessing) -> nn.Module:
    """The model that the arguments name, on its device. Raises ValueError where it does not take images so prepared, or
    returns more than a tensor."""
    if arguments.checkpoint is None and arguments.weights is None and \
            arguments.model.startswith(("torchvision:", "timm:")):
        tell("random weights; give --checkpoint or --weights for trained ones")
    made = models.load(arguments.model, checkpoint=arguments.checkpoint, weights=arguments.weights,
                       classes=arguments.classes, seed=arguments.seed, tell=tell)
    made = made.to(device(arguments))
    models.check_runs(made, arguments.model, example(arguments, prepare))
    return made


def tell(line: str) -> None:
    """Say something beside the result; of several processes, the first says it."""
    if processes.rank_and_world_size()[0] == 0:
        print(f"note: {line}", file=sys.stderr)


def device(arguments: argparse.Namespace) -> torch.device:
    """--device, or the GPU where there is one. Raises ValueError for one that cannot be used."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=processes.own_device(torch.device(name))).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from error


def preprocessing(arguments: argparse.Namespace) -> images.Preprocessing:
    """How the model wants its images."""
    return images.preprocessing(arguments.model, arguments.weights, arguments.size, arguments.mean, arguments.std,
                                vars(arguments).get("checkpoint"))


def add_units(folder: argparse._ActionsContainer) -> None:
    """What is scored beside the channels."""
    folder.add_argument("--units", type=removable_units, default="groups", metavar="NAME",
                        help="blocks: whole residual branches can go beside the channels; experts: whole experts of "
                        "mixtures, likewise; head_dims: dimensions of attention heads in the place of whole heads; "
                        "heads_and_dims: both; blocks+heads_and_dims, and the like, under one budget (default: "
                        "%(default)s)")


def scored(model: nn.Module, arguments: argparse.Namespace, prepare: images.Preprocessing,
           batches: images.ImageBatches | None = None, **how: Any) -> Scores:
    """Scores from the folder of images; from the weights alone where the importance asks for no more.

    batches: some of the images, to score on in place of all. how: more arguments for fastscore.score.
    """
    if arguments.importance in WEIGHT_IMPORTANCES:
        scores = fastscore.score(model, [example(arguments, prepare)], importance=arguments.importance,
                                 seed=arguments.seed, layerwise=arguments.layerwise, ignore=arguments.ignore, **how)
        return replace(scores, notes=notes(arguments, prepare))
    if arguments.images is None:
        raise ValueError(f"images: {arguments.importance} needs a folder of them; give --images FOLDER")
    if batches is None:
        paths = images.find(arguments.images, arguments.samples, arguments.seed)
        batches = images.batches(paths, prepare, arguments.batch_size)
    samples: int | Literal["auto"] = "auto" if arguments.samples == "auto" else sum(map(len, batches.chunks))
    tell(f"images: {prepare}")
    try:
        with units.told_here():
            scores = fastscore.score(model, batches, samples=samples, ablation=ablation(arguments),
                                     **{name: getattr(arguments, name) for name in
                                        ("importance", "units", "reduction", "layerwise", "probes", "distribution",
                                         "center", "normalize", "seed", "ignore", "precision", "compile")}, **how)
    except KeyboardInterrupt:
        if "resume" not in how:
            tell("nothing is kept of this scoring; `fastscore score --resume FILE --out SCORES` can be stopped and go "
                 "on, and --scores takes what it writes")
        raise
    units.say(arguments.units, model, scores, tell)
    return replace(scores, notes=notes(arguments, prepare))


def notes(arguments: argparse.Namespace, prepare: images.Preprocessing,
          scores: Scores | None = None) -> dict[str, str]:
    """Where scores come from, to be kept with them: model, weights, what was made of the images, when, and by what.

    scores: read from a file: where what is made by them comes from. Model, weights, date and versions are then those of
    now, images and preprocessing those that were scored, and `scores` tells the file and the rest that it says.
    """
    known = {"model": arguments.model, "weights": arguments.weights, "checkpoint": arguments.checkpoint}
    if arguments.checkpoint is not None:
        known["checkpoint"] += f" (sha256 {sha256(arguments.checkpoint)})"
    elif arguments.model.startswith("hf:"):
        known["revision"] = hugging_face.revision(models.parse(arguments.model)[1])
    if scores is not None:
        known |= {name: scores.notes.get(name) for name in _OF_THE_IMAGES}
    elif arguments.importance not in WEIGHT_IMPORTANCES:
        known |= {"images": arguments.images, "preprocessing": str(prepare)}
    given = [(f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name in _OF_THE_MODEL
             if (value := getattr(arguments, name)) is not None]
    known["options"] = " ".join(itertools.chain(*given)) or None  # that every command on this model needs
    known["date"] = _now()
    known["versions"] = f"fastscore {fastscore.__version__}, torch {torch.__version__}"
    if scores is not None:
        rest = [f"{name} {text}" for name, text in scores.notes.items() if name not in _OF_THE_IMAGES]
        known["scores"] = "; ".join([arguments.scores, *(rest or ["which do not say what they were made of"])])
    return {name: value for name, value in known.items() if value is not None}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(" ", "minutes")


def load_scores(arguments: argparse.Namespace) -> Scores:
    """The scores that `scores` names, whose notes fill in --size, --classes, --mean and --std where they are not given
    and the model is the one that was scored.

    Raises FileNotFoundError, or ValueError for what is no score file or no name of a model, or for scores of trained
    weights where none are given for the model.
    """
    if arguments.model is not None:
        models.parse(arguments.model)  # before what is said of its weights
    try:
        scores = Scores.load(arguments.scores)
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise type(error)(f"scores: {error}") from error
    if "checkpoint" in vars(arguments):  # of a command that needs weights
        _check_weights(scores, arguments)
    if arguments.model is None or scores.notes.get("model") != arguments.model:
        if arguments.model is not None and "model" in scores.notes:
            tell(f"{arguments.scores} is of {scores.notes['model']}, and this is {arguments.model}")
        return scores
    file = vars(arguments).get("checkpoint")
    weights, _ = noted_weights(scores.notes) or ("other weights", "")
    if vars(arguments).get("weights") is not None and arguments.weights != scores.notes.get("weights"):
        tell(f"{arguments.scores} is of {weights}, and not of the weights {arguments.weights}")
    if file is not None and Path(file).is_file() and not weights.endswith(f"{sha256(file)})"):
        tell(f"{arguments.scores} is of {weights}, and {file} is another file")
    noted = Parser(prog="fastscore")
    add_pixels(noted)
    noted.add_argument("--classes", type=positive)
    known = noted.parse_args(scores.notes.get("options", "").split())
    filled = []
    for name in _OF_THE_MODEL:
        if getattr(arguments, name) is None and (value := getattr(known, name)) is not None:
            setattr(arguments, name, value)
            filled.append(f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    if filled:
        tell(f"{', '.join(filled)}: as {arguments.scores} says")
    return scores


def _check_weights(scores: Scores, arguments: argparse.Namespace) -> None:
    """Raise ValueError, with the option to add, for scores of a file of weights, or of downloaded ones, where neither
    is given: the model would have random ones. A model of another name may have weights of its own."""
    model = arguments.model
    ours, theirs = (spec.rpartition(":")[2] for spec in (model, scores.notes.get("model", model)))
    asked = noted_weights(scores.notes)
    if asked is not None and arguments.checkpoint is None and arguments.weights is None and ours == theirs:
        raise ValueError(f"scores: {arguments.scores} is of {asked[0]}, and no weights are given for {model}: "
                         f"add {asked[1]}")


def example(arguments: argparse.Namespace, prepare: images.Preprocessing) -> Tensor:
    """A batch of two black images."""
    return torch.zeros(2, *prepare.shape, device=device(arguments))
