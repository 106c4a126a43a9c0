"""Pictures of scores, and what every picture shares. Needs matplotlib (the extra `plot`)."""

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore import files
from fastscore.arguments import check_fraction, needed

COLOUR, REMOVED = "#0b6e99", "#d9730d"
LABELLED_LAYERS = 60  # more names than this do not fit under an axis


def figure(width: float = 6.4, height: float = 4.8) -> Any:
    """A matplotlib figure, in inches. Raises ImportError, saying what to install."""
    drawing = needed("matplotlib.figure", "plots need matplotlib", "'torch-fastscore[plot]'")
    return drawing.Figure((width, height), layout="constrained")


def save(drawing: Any, path: str | PathLike[str]) -> None:
    """Write a figure, whole or not at all."""
    with files.whole(path) as part:
        drawing.savefig(part, dpi=150)


def check(path: str | PathLike[str], argument: str = "path") -> None:
    """Raise before any work is done for a plot: ImportError without matplotlib, ValueError, naming the argument, for an
    unknown suffix."""
    suffix, known = Path(path).suffix.removeprefix("."), figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"{argument}: {path}: a plot's suffix is one of {', '.join(known)}")


def importances(scores: Mapping[str, Tensor], path: str | PathLike[str], fraction: float = 0.0) -> None:
    """Draw each layer's importances, layers from input to output: a dot a channel, a bar at the median.

    scores: layer -> importance [C]. Zeros have no place on the logarithmic axis; they are counted below it. fraction:
    the lowest share of all channels, drawn in another colour (see `lowest`).

    Raises ImportError without matplotlib, ValueError for an unknown suffix or a fraction outside [0, 1).
    """
    check(path)
    layers, below = list(scores), lowest(scores, fraction)
    drawing = figure(min(max(6.4, 2 + 0.3 * len(layers)), 18), 4.8)
    axes = drawing.subplots()
    for position, layer in enumerate(layers):
        values = scores[layer].double()
        positive = values[values > 0]
        spread = torch.linspace(-0.3, 0.3, len(positive))[torch.randperm(
            len(positive), generator=torch.Generator().manual_seed(0))]
        goes = below[layer][values > 0]
        for chosen, colour in ((~goes, COLOUR), (goes, REMOVED)):
            axes.plot(position + spread[chosen].numpy(), positive[chosen].numpy(), ".", color=colour, alpha=0.35,
                      markersize=4, markeredgewidth=0)
        if (median := values.quantile(0.5).item()) > 0:
            axes.hlines(median, position - 0.4, position + 0.4, color="black", linewidth=1.2)
        if len(positive) < len(values):
            axes.annotate(f"{len(values) - len(positive)}", (position, 0.005), xycoords=("data", "axes fraction"),
                          ha="center", va="bottom", fontsize=6, color="#b00020")
    axes.set_yscale("log")
    axes.set_ylabel("importance of a channel")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    if len(layers) <= LABELLED_LAYERS:
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    else:
        axes.set_xlabel(f"{len(layers)} layers, from input to output")
    zeros = any((scores[layer] == 0).any() for layer in layers)
    count = sum(int(goes.sum()) for goes in below.values())
    axes.set_title("a dot for each channel, a bar at the median" + ("; red: how many are zero" if zeros else "")
                   + (f"; orange: the {count:,} lowest, {fraction:.0%} of all" if count else ""), fontsize=9)
    plain(axes)
    save(drawing, path)


def lowest(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Layer -> bool [C]: the lowest `fraction` of all channels, but for the last one of each layer.

    Ties go in order of layer and channel. Raises ValueError for a fraction outside [0, 1).
    """
    check_fraction(fraction)
    goes = {layer: torch.zeros(len(values), dtype=torch.bool) for layer, values in scores.items()}
    left = math.ceil(fraction * sum(map(len, goes.values())) - 1e-9)
    every = [(layer, channel) for layer, marks in goes.items() for channel in range(len(marks))]
    for place in torch.cat(list(scores.values())).argsort(stable=True).tolist():
        layer, channel = every[place]
        if left and int(goes[layer].sum()) < len(goes[layer]) - 1:
            goes[layer][channel] = True
            left -= 1
    return goes


def plain(axes: Any) -> None:
    """No frame but the axes, and faint lines to read heights by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
