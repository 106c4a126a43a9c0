"""Draws what `python -m benchmarks.paper` wrote, and the paper's own curves beside it.

    python -m benchmarks.paper.figures benchmarks/results/paper/fashion-mnist.csv

Writes next to the CSV: DATASET-curves.png (as the paper's figures: a panel for each number of samples),
DATASET-samples.png (what the samples bring), DATASET-further.png (structural channels, with and without compensation;
where it was measured) and DATASET.md (the mean accuracy over each curve).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.paper.results import Key, Results, published
from benchmarks.paper.variants import IMPORTANCES, PAPER
from fastscore.plots import figure, plain

CRITERIA = dict(zip(IMPORTANCES, ("#7a7a7a", "#c9a227", "#d9730d", "#3f8f4f", "#0b5fa5"), strict=True))
GRADIENTS: dict[str, tuple[str, Any]] = {  # ending of a variant's name -> what it says, line style
    "": ("loss", "-"),
    ":norm": ("loss, normalized", (0, (5, 1.5))),
    ":random": ("random", (0, (2, 1))),
    ":random:norm": ("random, normalized", (0, (0.9, 1.1))),
}
BAND = 0.10  # opacity


def lines(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Variant -> how its line looks, for those that the paper compares."""
    looks = {f"{criterion}{ending}": {"color": colour, "linestyle": style}
             for criterion, colour in CRITERIA.items() for ending, (_, style) in GRADIENTS.items()}
    return {name: looks[name] for name in names if name in looks}


def draw(axes: Any, removed: Sequence[int], runs: Tensor, band: float = BAND, **look: Any) -> None:
    """One line, the mean of `runs` [R, points], in a band of one standard deviation."""
    mean = runs.mean(0)
    axes.plot(removed, mean.numpy(), **{"linewidth": 1.1, **look})
    if len(runs) > 1 and band:
        spread = runs.std(0)
        axes.fill_between(removed, (mean - spread).numpy(), (mean + spread).numpy(), color=look["color"], alpha=band,
                          linewidth=0)


def curves(results: Results, path: Path) -> None:
    """Accuracy against masked gates, a panel for each network and D; the paper's curves in a row below, if any."""
    networks = results.values("network", units="norms")
    rows = [(network, f"{network}, {source}" if paper else network, found) for network in networks
            for paper in [published(results.dataset, network)]
            for source, found in ([("ours", results), ("the paper's", paper)] if paper else [("", results)])]
    columns = max(len(found.values("samples", network=network, units="norms")) for network, _, found in rows)
    drawing = figure(3.1 * columns + 0.3, 2.6 * len(rows) + 0.8)
    panels = drawing.subplots(len(rows), columns, squeeze=False, sharey="row")
    for (network, title, found), row in zip(rows, panels, strict=True):
        for samples, axes in zip(found.values("samples", network=network, units="norms"), row, strict=False):
            for name, look in lines(variant.name for variant in PAPER).items():
                key = Key(network, samples, "norms", name, False)
                if key in found.runs:
                    draw(axes, found.removed[network, "norms"], found.runs[key], 0.05, **look)
            axes.set_title(f"{title}: {samples:,} samples", fontsize=9)
            _percent(axes)
        row[0].set_ylabel("test accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("masked gates")
    _legend(drawing, [(name, {"color": colour}) for name, colour in CRITERIA.items()],
            [(words, {"color": "black", "linestyle": style}) for words, style in GRADIENTS.values()])
    drawing.savefig(path, dpi=150)


def samples(results: Results, path: Path) -> None:
    """Mean accuracy over the curve against D, a panel for each network and kind of gradient."""
    networks = results.values("network", units="norms")
    drawing = figure(3.1 * len(GRADIENTS) + 0.3, 2.6 * len(networks) + 0.6)
    panels = drawing.subplots(len(networks), len(GRADIENTS), squeeze=False, sharey="row", sharex=True)
    for network, row in zip(networks, panels, strict=True):
        for (ending, (words, _)), axes in zip(GRADIENTS.items(), row, strict=True):
            for criterion, colour in CRITERIA.items():
                found = {key.samples: runs.mean(1, keepdim=True) for key, runs in results.runs.items()
                         if key[0] == network and key[2:] == ("norms", criterion + ending, False)}
                if found:
                    order = sorted(found)
                    means = [float(found[count].mean()) for count in order]
                    spread = [float(found[count].std()) if len(found[count]) > 1 else 0.0 for count in order]
                    axes.errorbar(order, means, spread, color=colour, marker="o", markersize=3.5, linewidth=1.3,
                                  elinewidth=0.8, capsize=0)
            axes.set_xscale("log")
            axes.set_title(f"{network}: {words}", fontsize=9)
            _percent(axes)
        row[0].set_ylabel("mean accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("samples")
    _legend(drawing, [(name, {"color": colour, "marker": "o", "markersize": 3.5}) for name, colour in CRITERIA.items()])
    drawing.savefig(path, dpi=150)


def compare(results: Results, shown: Mapping[str, tuple[str, bool, Mapping[str, Any]]], units: str, path: Path) -> None:
    """Accuracy against removed units for a few variants, a panel for each network and D.

    shown: label -> (variant, compensated?, how its line looks). units: "norms" or "groups".
    """
    networks = results.values("network", units=units)
    columns = max(len(results.values("samples", network=network, units=units)) for network in networks)
    drawing = figure(3.1 * columns + 0.3, 2.6 * len(networks) + 0.8)
    panels = drawing.subplots(len(networks), columns, squeeze=False, sharey="row")
    for network, row in zip(networks, panels, strict=True):
        for count, axes in zip(results.values("samples", network=network, units=units), row, strict=False):
            for variant, compensated, look in shown.values():
                key = Key(network, count, units, variant, compensated)
                if key in results.runs:
                    draw(axes, results.removed[network, units], results.runs[key], **look)
            axes.set_title(f"{network}: {count:,} samples", fontsize=9)
            _percent(axes)
        row[0].set_ylabel("test accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("masked gates" if units == "norms" else "removed channels")
    _legend(drawing, [(label, look) for label, (_, _, look) in shown.items()])
    drawing.savefig(path, dpi=150)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.tick_params(labelsize=8)
    plain(axes)


def _legend(drawing: Any, *rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """One legend below all panels, a row for each of `rows`."""
    from matplotlib.lines import Line2D

    for row in reversed(rows):
        handles = [Line2D([], [], **{"linewidth": 1.6, **look}) for _, look in row]
        drawing.legend(handles, [label for label, _ in row], loc="outside lower center", ncols=min(len(row), 6),
                       frameon=False, fontsize=9)
