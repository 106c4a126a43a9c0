"""The demo's picture: accuracy against what remains, and what remains of each layer."""

import statistics
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from fastscore import plots
from fastscore.cli import digits
from fastscore.cli.digits import IMPORTANCES, TARGET, Result

_COLOURS = {"fastscore": plots.COLOUR, "magnitude": "#d9730d", "random": "#7f7f7f"}


def draw(result: Result, path: str | PathLike[str]) -> None:
    """Draw accuracy against what remains of the MACs, and the widths of the layers at half of them."""
    drawing = plots.figure(11, 4.2)
    curves, widths = drawing.subplots(1, 2)
    dense = statistics.mean(outcome.before for outcome in result.outcomes["dense"])
    for order, name in enumerate(IMPORTANCES):
        outcomes = result.outcomes[name]
        colour = _COLOURS[name]
        mean, deviation = _moments([(dense, *outcome.curve) for outcome in outcomes])
        remains = torch.tensor([1.0, *digits.SHARES]).numpy()
        curves.plot(remains, mean, "o-", color=colour, markersize=4, label=name)
        curves.fill_between(remains, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        repaired, tuned = (statistics.mean(getattr(outcome, stage) for outcome in outcomes)
                           for stage in ("repaired", "after"))
        curves.plot(TARGET, repaired, "D", color=colour, markersize=6, alpha=0.8)
        curves.plot(TARGET, tuned, "*", color=colour, markersize=11, alpha=0.8)
        layers = list(outcomes[0].widths)
        share, _ = _moments([list(outcome.widths.values()) for outcome in outcomes])
        widths.bar(torch.arange(len(layers)).numpy() + 0.27 * (order - 1), share, 0.25, color=colour, label=name)
    curves.plot([], [], "D", color="#444444", markersize=6, label="repaired, without labels")
    curves.plot([], [], "*", color="#444444", markersize=11, label="fine-tuned, with labels")
    curves.set(xlabel="MACs that remain", ylabel="test accuracy", ylim=(0, 1.03))
    curves.invert_xaxis()
    networks = len(result.outcomes["dense"])
    curves.set_title(f"digits, {networks} networks: mean, band of one standard deviation" if networks > 1
                     else "digits, one network", fontsize=10)
    widths.set(ylabel="channels that remain", ylim=(0, 1.03))
    widths.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    widths.set_title(f"at {TARGET:.0%} of the MACs, by layer from input to output", fontsize=10)
    for axes in (curves, widths):
        axes.yaxis.set_major_formatter("{x:.0%}")
        plots.plain(axes)
    curves.xaxis.set_major_formatter("{x:.0%}")
    curves.legend(frameon=False, loc="lower left")
    plots.save(drawing, path)


def _moments(rows: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """(mean, standard deviation, 0 for a single row) of each column, as arrays."""
    table = torch.tensor(rows, dtype=torch.float64)
    deviation = table.std(0) if len(rows) > 1 else torch.zeros(table.shape[1])
    return table.mean(0).numpy(), deviation.numpy()
