"""What an option's text becomes, or why it cannot."""

import argparse
from collections.abc import Callable

from fastscore.graph.scored_units import named
from fastscore.scoring.criteria import NAMES
from fastscore.scoring.options import Sampling

# A random gradient has mean zero, and with it the signed `taylor`: only noise would remain.
IMPORTANCES = [name for name in NAMES if name != "taylor"]


def importance(text: str) -> str:
    """One of IMPORTANCES."""
    if text == "taylor":
        raise argparse.ArgumentTypeError("taylor has a sign, which random gradients leave nothing of: taylor-sq or "
                                         "taylor-abs; for gradients of a loss, fastscore.Scorer in a training loop")
    if text not in IMPORTANCES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(IMPORTANCES)}")
    return text


def removable_units(text: str) -> str:
    """Units that can be removed, one kind or several."""
    try:
        units = named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("units: ")) from error
    if units == "norms":
        raise argparse.ArgumentTypeError("norms can be masked and not removed: fastscore.score takes them")
    return units


def share(text: str) -> float:
    """A number, such as the share of a budget."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; a share such as 0.7 is meant") from None


def positive(text: str) -> int:
    """An integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be a whole number, 1 or more")
    return value


def of_sampling(name: str) -> Callable[[str], int | str]:
    """What fastscore.score takes for `probes` or `samples`: an integer, or a word."""
    def convert(text: str) -> int | str:
        value = int(text) if text.lstrip("-").isdigit() else text
        try:
            Sampling(**{name: value})  # type: ignore[arg-type]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error
        return value

    return convert


def positive_or_auto(text: str) -> int | str:
    """An integer of 1 or more, or "auto"."""
    if text == "auto":
        return text
    if not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text}: it must be auto, or 1 or more")
    return positive(text)
