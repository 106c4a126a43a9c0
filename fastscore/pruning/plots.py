"""Pictures of pruned models. Needs matplotlib (the extra `plot`)."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from fastscore import plots
from fastscore.plots import COLOUR, LABELLED_LAYERS, REMOVED, plain, save
from fastscore.pruning.report import PruneReport
from fastscore.recovery.divergence import mixed_of, names


def pruning(report: PruneReport, path: str | PathLike[str]) -> None:
    """Draw each layer's channels and MACs, layers from input to output: what was there, and what remains of it.

    With a latency budget, also the measured share of the time against the share of the MACs, for each model tried.
    Raises ImportError without matplotlib, ValueError for an unknown suffix.
    """
    plots.check(path)
    rows, curve = report.groups, report.candidates
    drawing = plots.figure(min(max(6.4, 2 + 0.3 * len(rows)), 18), 7.2 if not curve else 10.2)
    panels = drawing.subplots(2 + bool(curve))
    for axes, quantity, name in ((panels[0], "channels", "channels"), (panels[1], "macs", "MACs of one sample")):
        before, after = ([getattr(row, quantity)[side] for row in rows] for side in (0, 1))
        axes.bar(range(len(rows)), before, color=COLOUR, alpha=0.25, label="before")
        axes.bar(range(len(rows)), after, color=COLOUR, label="after")
        whole = getattr(report, quantity)
        axes.set_title(f"{name}: {whole[1]:,} of {whole[0]:,} remain ({whole[1] / max(whole[0], 1):.1%})", fontsize=9)
        axes.set_xlim(-0.7, len(rows) - 0.3)
        axes.set_xticks([])
        axes.set_axisbelow(True)
        plain(axes)
    panels[0].legend(fontsize=8, frameon=False)
    if len(rows) <= LABELLED_LAYERS:
        panels[1].set_xticks(range(len(rows)), [row.layer for row in rows], rotation=90, fontsize=7)
    else:
        panels[1].set_xlabel(f"{len(rows)} layers, from input to output")
    if curve:
        panels[2].errorbar([tried.macs for tried in curve], [tried.timing.share for tried in curve],
                           [tried.timing.uncertainty for tried in curve], fmt="o-", color=COLOUR, markersize=4)
        chosen = [tried for tried in curve if tried.chosen]
        panels[2].plot([tried.macs for tried in chosen], [tried.timing.share for tried in chosen], "o",
                       color=REMOVED, zorder=3)
        panels[2].set_title("measured share of the time against the share of the MACs; orange: the one returned",
                            fontsize=9)
        plain(panels[2])
    save(drawing, path)


def curves(found: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Draw Curves: agreement, KL divergence and the metric, where there is one, against the share of the MACs that
    remains: a line for each curve, dashed before the repair, where a single curve has both. Raises as `pruning` does.
    """
    plots.check(path)
    first = next(iter(found.values()))
    panels = {"agreement": "agreement with the dense network", "kl": "KL divergence from the dense network, nats"}
    if first.by_error:
        panels = {"agreement": "R², of the dense network's outputs", "kl": "squared error, share of their variance"}
    if mixed := mixed_of(each.mixed for each in found.values()):
        agreement, kl = names(first.by_error, mixed)
        panels = {"agreement": f"{agreement}, the least of all outputs", "kl": f"{kl}, of all outputs"}
    if first.dense is not None:
        panels["metric"] = "metric"
    drawing = plots.figure(4.2 * len(panels), 3.8)
    for axes, (name, title) in zip(drawing.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (label, each) in enumerate(found.items()):
            colour = COLOUR if len(found) == 1 else f"C{number}"
            shares = [row.macs for row in each.rows]
            repaired = [row.repaired for row in each.rows if row.repaired is not None]
            if repaired:
                axes.plot(shares, [getattr(point, name) for point in repaired], "o-", color=colour, markersize=4,
                          label=label or "repaired")
            if len(found) == 1 or not repaired:
                axes.plot(shares, [getattr(row.cut, name) for row in each.rows], "o--", color=colour, markersize=4,
                          alpha=0.6 if repaired else 1, label="cut" if repaired or not label else label)
        if name == "metric" and first.dense is not None:
            axes.axhline(first.dense, color=REMOVED, linewidth=1, label="dense")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("MACs that remain", fontsize=9)
        axes.xaxis.set_major_formatter(lambda share, position: f"{share:.0%}")
        axes.invert_xaxis()
        if name == "agreement":
            axes.yaxis.set_major_formatter(lambda share, position: f"{share:.0%}")
            axes.legend(fontsize=8, frameon=False)
        plain(axes)
    save(drawing, path)
