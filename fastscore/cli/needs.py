"""What options need to have an effect: one that would be ignored is an error, or a note where it does no harm."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastscore import files
from fastscore.cli import options
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

READ_BY_INFO = (".safetensors", ".pt2", ".onnx", ".pt")  # suffixes of the files that info reads; those of runs have any

_GRADIENTS = ("--units", "--reduction", "--ablation", "--probes", "--distribution", "--center", "--no-normalize",
              "--precision", "--compile")
_PIXELS = ("--size", "--mean", "--std")
_MODEL = ("--checkpoint", "--weights", "--classes", *_PIXELS)

_NOTHING_REPAIRED = "nothing is repaired here, which takes images: give --images FOLDER, and neither --no-repair nor " \
                    "--no-compensate; or leave it out"

BUDGETS = ("macs", "params", "channels", "latency")


@dataclass(frozen=True)
class Need:
    """commands: that have these options. met: whether they have an effect. otherwise: why they have none, and the way
    out; {importance} stands for that option's value. harmless: to be said, and no error."""

    commands: tuple[str, ...]
    options: tuple[str, ...]
    met: Callable[[argparse.Namespace], bool]
    otherwise: str
    harmless: bool = False


def names_file(model: str) -> bool:
    """Whether what stands in MODEL's place is a file that info reads."""
    return model.endswith(READ_BY_INFO) or files.form_of(model) != ""


def _reads_images(arguments: argparse.Namespace) -> bool:
    scores = vars(arguments).get("scores") is None and arguments.importance not in WEIGHT_IMPORTANCES
    return scores or (arguments.command != "score" and options.repairs(arguments))


NEEDS = (
    Need(("prune",), ("--confidence",), lambda given: given.agreement is not None,
         "it says how surely --agreement holds: give --agreement 0.98, too"),
    Need(("prune",), ("--held-out",), lambda given: given.agreement is not None,
         "its images judge --agreement: give --agreement 0.98, too, or leave it out"),
    Need(("prune",), ("--agreement",), lambda given: not any(vars(given)[name] for name in BUDGETS),
         "it is a budget of its own, which leaves as little as will do: leave it out, or --macs and the like"),
    Need(("prune",), ("--clock",), lambda given: given.latency is not None,
         "it measures --latency: give --latency 0.7, too"),
    Need(("prune", "curve"), ("--importance", "--layerwise", *_GRADIENTS), lambda given: given.scores is None,
         "it says how to score, and --scores has been scored: leave one of them out"),
    Need(("score", "prune", "curve"), _GRADIENTS, lambda given: given.importance not in WEIGHT_IMPORTANCES,
         "{importance} reads weights and no gradients: leave it out, or give --importance taylor-sq"),
    Need(("score", "prune", "curve"), ("--distribution",), lambda given: given.probes != "exact",
         "--probes exact draws no gradients at random: leave one of them out"),
    Need(("prune",), ("--images",), _reads_images, "nothing reads an image here", harmless=True),
    Need(("score",), ("--images", "--samples", "--batch-size"), _reads_images,
         "{importance} reads weights, and no image", harmless=True),
    Need(("prune",), ("--samples", "--batch-size"), lambda given: given.images is not None,
         "it is of images, and there are none: give --images FOLDER, or leave it out"),
    Need(("prune",), ("--repair",), lambda given: given.repair is None or options.repairs(given), _NOTHING_REPAIRED),
    Need(("prune",), ("--outputs", "--measured"), options.repairs, _NOTHING_REPAIRED),
    Need(("curve", "compare"), ("--measured",), options.repairs,
         "it measures what repairs give back: leave it out, or --no-repair"),
    Need(("report",), ("--classes", *_PIXELS), lambda given: given.model is not None,
         "it is of a model, and none is named: fastscore report SCORES MODEL, or leave it out"),
    Need(("bench",), (*_MODEL, "--batch-size"), lambda given: given.model is not None,
         "it is of a model, and none is named: fastscore bench MODEL, or leave it out"),
    Need(("info",), (*_MODEL, "--device", "--units"),
         lambda given: given.model is not None and not names_file(given.model),
         "it is of a model, and none is named: fastscore info MODEL, or leave it out"),
)


def check(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Raise ValueError, before any work, for an option that would be ignored; say so where that does no harm.

    given: the words of the command line, as they were typed.
    """
    typed = {word.partition("=")[0] for word in given}
    for need in NEEDS:
        if arguments.command in need.commands and not need.met(arguments):
            for option in (each for each in need.options if each in typed):
                said = f"{option}: {need.otherwise.format(importance=vars(arguments).get('importance'))}"
                if not need.harmless:
                    raise ValueError(said)
                options.tell(said)
