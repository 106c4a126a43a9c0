"""Pictures of scores. Needs matplotlib (the extra `plot`)."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLOUR = "#0b6e99"
_LABELLED_LAYERS = 60  # more names than this do not fit under an axis


def figure(width: float = 6.4, height: float = 4.8) -> Any:
    """A matplotlib figure, in inches. Raises ImportError, saying what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'torch-fastscore[plot]'") from error
    return Figure((width, height), layout="constrained")


def check(path: str | PathLike[str]) -> None:
    """Raise before any work is done for a plot: ImportError without matplotlib, ValueError for an unknown suffix."""
    suffix, known = Path(path).suffix.removeprefix("."), figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"{path}: a plot's suffix is one of {', '.join(known)}")


def importances(scores: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Draw each layer's importances, layers from input to output: a dot a channel, a bar at the median.

    scores: layer -> importance [C]. Zeros have no place on the logarithmic axis; they are counted below it.
    """
    layers = list(scores)
    drawing = figure(min(max(6.4, 2 + 0.3 * len(layers)), 18), 4.8)
    axes = drawing.subplots()
    for position, layer in enumerate(layers):
        values = scores[layer].double()
        positive = values[values > 0]
        spread = torch.linspace(-0.3, 0.3, len(positive))[torch.randperm(
            len(positive), generator=torch.Generator().manual_seed(0))]
        axes.plot(position + spread.numpy(), positive.numpy(), ".", color=COLOUR, alpha=0.35,
                  markersize=4, markeredgewidth=0)
        if values.median() > 0:
            axes.hlines(values.median().item(), position - 0.4, position + 0.4, color="black", linewidth=1.2)
        if len(positive) < len(values):
            axes.annotate(f"{len(values) - len(positive)}", (position, 0.005), xycoords=("data", "axes fraction"),
                          ha="center", va="bottom", fontsize=6, color="#b00020")
    axes.set_yscale("log")
    axes.set_ylabel("importance of a channel")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    if len(layers) <= _LABELLED_LAYERS:
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    else:
        axes.set_xlabel(f"{len(layers)} layers, from input to output")
    zeros = any((scores[layer] == 0).any() for layer in layers)
    axes.set_title("a dot for each channel, a bar at the median" + ("; red: how many are zero" if zeros else ""),
                   fontsize=9)
    plain(axes)
    drawing.savefig(path, dpi=150)


def plain(axes: Any) -> None:
    """No frame but the axes, and faint lines to read heights by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
