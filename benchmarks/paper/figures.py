"""Draws what `python -m benchmarks.paper` wrote, and the paper's own curves beside it.

    python -m benchmarks.paper.figures benchmarks/results/paper/fashion-mnist.csv

Writes into the folder of the CSV, for what was measured:
    DATASET-curves.png        accuracy against masked gates, a panel for each number of samples, as in the paper
    DATASET-samples.png       mean accuracy over the curve against the number of samples
    DATASET-compensation.png  structural channels, with and without compensation
    DATASET-element.png       a channel's positions summed before the square, or one by one
    DATASET-helped.png        Torch-Pruning's Taylor importance with labels and without
    DATASET.md                mean accuracies as tables
Lines are means over training and scoring seeds; bands and error bars one standard deviation between these.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.paper.results import Key, Results, published, read, table
from benchmarks.paper.variants import IMPORTANCES
from fastscore.plots import figure, plain

Legend = Iterable[tuple[str, Mapping[str, Any]]]  # labels, and how their lines look

DOTTED, DASHED, DENSE = (0, (2, 1)), (0, (5, 1.5)), (0, (0.9, 1.1))
CRITERIA = dict(zip(IMPORTANCES, ("#7a7a7a", "#c9a227", "#d9730d", "#3f8f4f", "#0b5fa5"), strict=True))
GRADIENTS = {"loss": "", "loss, normalized": ":norm", "random": ":random", "random, normalized": ":random:norm"}


@dataclass(frozen=True)
class Comparison:
    """What one figure compares: every colour in every style.

    units: "norms" or "groups". colours: how a variant's name begins -> colour. styles: label -> (how it ends,
    compensated?, line style). band: opacity. paper: whether the paper's curves of a network stand below ours.
    """

    units: str
    colours: Mapping[str, str]
    styles: Mapping[str, tuple[str, bool, Any]]
    band: float = 0.1
    paper: bool = False

    @property
    def legend(self) -> Legend:
        """Colours in a row, styles in the next, for a legend that is filled column by column."""
        for colour, style in itertools.zip_longest(self.colours.items(), self.styles.items()):
            yield ("", {"alpha": 0}) if colour is None else (colour[0], {"color": colour[1]})
            yield ("", {"alpha": 0}) if style is None else (style[0], {"color": "black", "linestyle": style[1][2]})


COMPARISONS = {
    "curves": Comparison("norms", CRITERIA, {
        words: (ending, False, style) for (words, ending), style
        in zip(GRADIENTS.items(), ("-", DASHED, DOTTED, DENSE), strict=True)}, 0.05, paper=True),
    "compensation": Comparison("groups", {
        "taylor-sq:random:norm": "#0b5fa5", "taylor-sq:random:norm:mean-ablation": "#7b3fa0",
        "taylor-abs:random:norm": "#3f8f4f", "magnitude-l2": "#d9730d", "bn-scale": "#c9a227", "random": "#7a7a7a"},
        {"removed": ("", False, DOTTED), "removed and compensated": ("", True, "-")}),
    "element": Comparison("norms", {
        "taylor-abs:norm": "#3f8f4f", "taylor-abs:random:norm": "#93cda0", "taylor-sq:norm": "#0b5fa5",
        "taylor-sq:random:norm": "#86b9e6"},
        {"a channel's positions summed first": ("", False, "-"), "one by one": (":element", False, DOTTED)}),
    "helped": Comparison("groups", {"torch-pruning": "#0b5fa5"}, {
        "gradients of the loss, with labels": ("", False, DOTTED),
        "fastscore.scoring.random_backward, without": (":random:norm", False, "-")}),
}


def compare(results: Results, comparison: Comparison, path: Path) -> None:
    """Accuracy against masked gates or removed channels: a row of panels for each network, a panel for each D."""
    units = comparison.units
    rows = [(network, source, found) for network in results.values("network", units=units)
            for source, found in (("", results), (" in the paper", published(results.dataset, network)))
            if found is not None and (comparison.paper or not source)]
    columns = max(len(found.values("samples", network=network, units=units)) for network, _, found in rows)
    drawing = figure(max(3.1 * columns + 0.3, 10.5), 2.5 * len(rows) + 0.9)
    panels = drawing.subplots(len(rows), columns, squeeze=False, sharey="row")
    for (network, source, found), row in zip(rows, panels, strict=True):
        for samples, axes in zip(found.values("samples", network=network, units=units), row, strict=False):
            for name, colour in comparison.colours.items():
                for ending, compensated, style in comparison.styles.values():
                    runs = found.runs.get(Key(network, samples, units, name + ending, compensated))
                    if runs is not None:
                        _line(axes, found.removed[network, units], runs, colour, style, comparison.band)
            axes.set_title(f"{network}{source}, {samples:,} samples", fontsize=9)
            axes.set_ylim(bottom=0)
            _percent(axes)
        row[0].set_ylabel("test accuracy", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("masked gates" if units == "norms" else "removed channels", fontsize=9)
    _finish(drawing, list(comparison.legend), len(comparison.colours), path)


def samples(results: Results, path: Path) -> None:
    """Mean accuracy over the curve against D, a panel for each network and kind of gradient; thin: the paper's."""
    networks = results.values("network", units="norms")
    drawing = figure(3.1 * len(GRADIENTS) + 0.3, 2.5 * len(networks) + 0.7)
    panels = drawing.subplots(len(networks), len(GRADIENTS), squeeze=False, sharey="row")
    for network, row in zip(networks, panels, strict=True):
        paper = published(results.dataset, network)
        for (words, ending), axes in zip(GRADIENTS.items(), row, strict=True):
            for criterion, colour in CRITERIA.items():
                if theirs := _by_samples(paper, network, criterion + ending):
                    axes.plot(list(theirs), [float(runs.mean()) for runs in theirs.values()], color=colour,
                              linewidth=0.7, linestyle=(0, (4, 2)))
                ours = _by_samples(results, network, criterion + ending)
                axes.errorbar(list(ours), [float(runs.mean()) for runs in ours.values()],
                              [_deviation(runs.mean(1)) for runs in ours.values()], color=colour, marker="o",
                              markersize=3.5, linewidth=1.3, elinewidth=0.8)
            axes.set_xscale("log")
            counts = results.values("samples", network=network, units="norms")
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.minorticks_off()
            axes.set_title(f"{network}, {words}", fontsize=9)
            _percent(axes)
        row[0].set_ylabel("mean accuracy", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("samples", fontsize=9)
    legend: list[tuple[str, Mapping[str, Any]]] = [
        (name, {"color": colour, "marker": "o", "markersize": 3.5}) for name, colour in CRITERIA.items()]
    if any(published(results.dataset, network) for network in networks):
        legend.append(("in the paper", {"color": "black", "linewidth": 0.7, "linestyle": (0, (4, 2))}))
    _finish(drawing, legend, len(legend), path)


def _by_samples(results: Results | None, network: str, variant: str) -> dict[int, Tensor]:
    """D -> runs [R, 31], D ascending."""
    found = {key.samples: runs for key, runs in results.runs.items()
             if key == Key(network, key.samples, "norms", variant, False)} if results else {}
    return dict(sorted(found.items()))


def _deviation(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def _line(axes: Any, removed: Sequence[int], runs: Tensor, colour: str, style: Any, band: float) -> None:
    """The mean of runs [R, points] in a band of one standard deviation."""
    mean = runs.mean(0)
    axes.plot(removed, mean.numpy(), color=colour, linestyle=style, linewidth=1.2)
    if len(runs) > 1:
        spread = runs.std(0)
        axes.fill_between(removed, (mean - spread).numpy(), (mean + spread).numpy(), color=colour, alpha=band,
                          linewidth=0)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.tick_params(labelsize=8)
    plain(axes)


def _finish(drawing: Any, legend: Sequence[tuple[str, Mapping[str, Any]]], columns: int, path: Path) -> None:
    """One legend below all panels, and the file."""
    from matplotlib.lines import Line2D

    drawing.get_layout_engine().set(hspace=0.06)
    drawing.legend([Line2D([], [], **{"linewidth": 1.6, **look}) for _, look in legend], [label for label, _ in legend],
                   loc="outside lower center", ncols=columns, frameon=False, fontsize=8 if columns > 5 else 9)
    drawing.savefig(path, dpi=150)


def draw(path: Path) -> Iterator[Path]:
    """Every figure that a CSV has curves for, and the tables; the files written."""
    results = read(path)
    there = {(key.units, key.variant, key.compensated) for key in results.runs}
    for kind, comparison in COMPARISONS.items():
        if all((comparison.units, name + ending, compensated) in there for name in comparison.colours
               for ending, compensated, _ in comparison.styles.values()):
            compare(results, comparison, path.with_name(f"{path.stem}-{kind}.png"))
            yield path.with_name(f"{path.stem}-{kind}.png")
    if results.values("network", units="norms"):
        samples(results, path.with_name(f"{path.stem}-samples.png"))
        yield path.with_name(f"{path.stem}-samples.png")
    tables = [f"### {network}, {'masked gates' if units == 'norms' else 'removed channels'}\n\n"
              f"{table(results, network, units)}\n" for network, units in sorted(results.removed)]
    path.with_suffix(".md").write_text("Mean test accuracy (%) over the 31 points of a curve ± standard deviation "
                                       "between networks; *(in italics)* the paper's.\n\n" + "\n".join(tables))
    yield path.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="what python -m benchmarks.paper wrote")
    for path in parser.parse_args().csv:
        for file in draw(path):
            print(file)


if __name__ == "__main__":
    main()
