"""Pictures: the distribution of scores by layer, and what the demo found. Needs matplotlib (the extra `plot`)."""

import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastscore.demo import Result

_COLOURS = {"fastscore": "#0b6e99", "magnitude": "#d9730d", "random": "#7f7f7f"}
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
        axes.plot(position + spread.numpy(), positive.numpy(), ".", color=_COLOURS["fastscore"], alpha=0.35,
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
    _plain(axes)
    drawing.savefig(path, dpi=150)


def demo(result: "Result", path: str | PathLike[str]) -> None:
    """Draw accuracy against what remains of the MACs, and the widths of the layers at half of them."""
    from fastscore.demo import IMPORTANCES, SHARES, TARGET

    drawing = figure(11, 4.2)
    curves, widths = drawing.subplots(1, 2)
    dense = statistics.mean(outcome.before for outcome in result.outcomes["dense"])
    for order, name in enumerate(IMPORTANCES):
        outcomes = result.outcomes[name]
        colour = _COLOURS[name]
        mean, deviation = _moments([(dense, *outcome.curve) for outcome in outcomes])
        remains = torch.tensor([1.0, *SHARES]).numpy()
        curves.plot(remains, mean, "o-", color=colour, markersize=4, label=name)
        curves.fill_between(remains, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        tuned = statistics.mean(outcome.after for outcome in outcomes)
        curves.plot(TARGET, tuned, "*", color=colour, markersize=11, alpha=0.8)
        layers = list(outcomes[0].widths)
        share, _ = _moments([list(outcome.widths.values()) for outcome in outcomes])
        widths.bar(torch.arange(len(layers)).numpy() + 0.27 * (order - 1), share, 0.25, color=colour, label=name)
    curves.plot([], [], "*", color="#444444", markersize=11, label="fine-tuned")
    curves.set(xlabel="MACs that remain", ylabel="test accuracy without fine-tuning", ylim=(0, 1.03))
    curves.invert_xaxis()
    networks = len(result.outcomes["dense"])
    curves.set_title(f"digits, {networks} networks: mean, band of one standard deviation" if networks > 1
                     else "digits, one network", fontsize=10)
    widths.set(ylabel="channels that remain", ylim=(0, 1.03))
    widths.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    widths.set_title(f"at {TARGET:.0%} of the MACs, by layer from input to output", fontsize=10)
    for axes in (curves, widths):
        axes.yaxis.set_major_formatter("{x:.0%}")
        _plain(axes)
    curves.xaxis.set_major_formatter("{x:.0%}")
    curves.legend(frameon=False, loc="lower left")
    drawing.savefig(path, dpi=150)


def _moments(rows: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """(mean, standard deviation, 0 for a single row) of each column, as arrays."""
    table = torch.tensor(rows, dtype=torch.float64)
    deviation = table.std(0) if len(rows) > 1 else torch.zeros(table.shape[1])
    return table.mean(0).numpy(), deviation.numpy()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
