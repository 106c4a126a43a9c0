"""`python -m benchmarks.recovery.first_picture`: README's first picture, from what `python -m benchmarks.recovery`
measured: one network's accuracy against the MACs that remain, dense, cut and repaired.
"""

import argparse
import csv
from pathlib import Path

from fastscore.plots import COLOUR, REMOVED, figure, plain

RESULTS = Path(__file__).parents[1] / "results" / "recovery"
LINES = (("per MAC / default", "cut and repaired (the default)", COLOUR, "o-"),
         ("per MAC / mean", "cut, before the repair", COLOUR, "o--"),
         ("importance alone / mean", "cut by plain importance, not per MAC", REMOVED, "o--"))


def points(rows: list[dict[str, str]], network: str, method: str) -> list[tuple[float, float]]:
    """(share of the MACs, top-1) from the dense network down; of several rows of one budget, the last one's."""
    found = {float(row["budget"]): (float(row["macs"]), float(row["top1"])) for row in rows
             if row["network"] == network and row["draw"] == "0" and row["method"] in (method, "dense")}
    return [found[budget] for budget in sorted(found, reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="mobilenet_v2", help="default: %(default)s")
    parser.add_argument("--out", default=str(RESULTS / "first.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    with (RESULTS / "recovery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    drawing = figure(7.2, 3.6)
    axes = drawing.subplots()
    for method, label, colour, style in LINES:
        shares, top1 = zip(*points(rows, arguments.network, method), strict=True)
        axes.plot(shares, top1, style, color=colour, label=label, markersize=5, alpha=0.6 if style == "o--" else 1)
    (_, dense), *_ = points(rows, arguments.network, "dense")
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label=f"dense: {dense:.1%}")
    axes.set_title("MobileNetV2, ImageNet weights: top-1, without labels or training", fontsize=10)
    axes.set_xlabel("MACs that remain", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, position: f"{share:.0%}")
    axes.invert_xaxis()
    axes.set_ylim(0, 0.9)
    axes.legend(fontsize=8, frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.4))
    plain(axes)
    drawing.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
