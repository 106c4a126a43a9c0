"""Tables and a picture from the rows of `python -m benchmarks.recovery`.

    python -m benchmarks.recovery.page benchmarks/results/recovery/recovery.csv

Writes recovery.md and recovery.png beside it.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.recovery.contestants import DEFAULT, FORMER, MEAN, METHODS, PEERS
from fastscore.plots import figure, plain

Runs = Mapping[tuple[str, str, str], Mapping[str, Mapping[str, float]]]  # (network, method, budget) -> draw -> values
UNITS = {"top1": 100.0, "agreement": 100.0, "kl": 1.0}
TITLES = {"top1": "Top-1, %", "agreement": "Agreement with the dense network, %",
          "kl": "KL from the dense network, nats"}
CURVES = {DEFAULT: "fastscore, repaired (default)", MEAN: "the same channels, mean compensation",
          FORMER: "importance alone, mean compensation"}
BEST = "Torch-Pruning, the best measured"
OLDER = "older code"  # begins the note of a row that the present code has not measured


def read(path: Path) -> Runs:
    """The rows of a CSV; of two with the same network, draw, method and budget the later."""
    runs: dict[tuple[str, str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            runs[row["network"], row["method"], row["budget"]][row["draw"]] = {
                **{field: float(row[field]) for field in ("macs", "params", "top1", "agreement", "kl", "seconds")},
                "older": float(row["note"].startswith(OLDER))}
    return runs


def cell(values: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation, of one value the value."""
    found = torch.tensor(list(values), dtype=torch.float64)
    if not len(found):
        return ""
    return f"{found.mean():.{digits}f}" + (f" ± {found.std():.{digits}f}" if len(found) > 1 else "")


def table(runs: Runs, network: str, field: str) -> list[str]:
    """Markdown: a row for each method, a column for each budget."""
    budgets = sorted({budget for name, _, budget in runs if name == network and budget != "1"}, reverse=True)
    lines = [f"| {TITLES[field]} | " + " | ".join(budgets) + " |", "|---" + "|---:" * len(budgets) + "|"]
    for method in METHODS:
        found = [runs.get((network, method, budget), {}).values() for budget in budgets]
        cells = [cell((UNITS[field] * draw[field] for draw in draws), 2 if field == "kl" else 1)
                 + (" †" if any(draw.get("older") for draw in draws) else "") for draws in found]
        if any(cells):
            shown = f"**{method}**" if method == DEFAULT else method
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return lines


def worse(runs: Runs, field: str, better: int) -> tuple[int, int]:
    """(cases, all cases) of network, draw and budget in which the default's `field` is worse than mean
    compensation's; better: 1 where more is better, -1 where less is."""
    count = total = 0
    for network, method, budget in runs:
        if method == DEFAULT:
            for draw, values in runs[network, method, budget].items():
                without = runs.get((network, MEAN, budget), {}).get(draw)
                if without and not values.get("older"):
                    total += 1
                    count += better * values[field] < better * without[field]
    return count, total


def page(runs: Runs) -> str:
    """All tables, in markdown."""
    lines = ["Written by `python -m benchmarks.recovery.page`. Columns are budgets, shares of the dense network's "
             "MACs; mean ± standard deviation between draws of calibration images. †: measured by an earlier version, "
             "and not since; such rows are not counted here.", ""]
    for field, better in (("kl", -1), ("agreement", 1), ("top1", 1)):
        count, total = worse(runs, field, better)
        if total:
            lines.append(f"- {field}: the default is worse than mean compensation alone in "
                         f"{count} of {total} cases ({100 * count / total:.1f} %) on judged images.")
    for network in dict.fromkeys(name for name, _, _ in runs):
        draws = runs.get((network, "dense", "1"), {})
        lines += ["", f"## {network}", "",
                  f"Dense: {cell((100 * draw['top1'] for draw in draws.values()), 1)} % top-1; {len(draws)} draws.", ""]
        for field in UNITS:
            lines += [*table(runs, network, field), ""]
    return "\n".join(lines)


def curves(runs: Runs, network: str) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Label -> (shares of MACs, mean top-1 in %, its deviation) of the methods that are drawn."""
    found = {}
    for method, label in CURVES.items():
        points = sorted((budget, draws) for (name, which, budget), draws in runs.items()
                        if (name, which) == (network, method))
        found[label] = _curve([list(draws.values()) for _, draws in points])
    best: dict[str, list[Mapping[str, float]]] = {}
    for (name, method, budget), draws in runs.items():
        rows = list(draws.values())
        if name == network and method.split(" / ")[0] in PEERS and (
                budget not in best or _mean(rows, "top1") > _mean(best[budget], "top1")):
            best[budget] = rows
    found[BEST] = _curve([best[budget] for budget in sorted(best)])
    return {label: curve for label, curve in found.items() if curve[0]}


def _mean(rows: list[Mapping[str, float]], field: str) -> float:
    return sum(row[field] for row in rows) / len(rows)


def _curve(points: list[list[Mapping[str, float]]]) -> tuple[list[float], list[float], list[float]]:
    spread = [float(torch.tensor([100 * row["top1"] for row in rows]).std()) if len(rows) > 1 else 0.0
              for rows in points]
    return [_mean(rows, "macs") for rows in points], [100 * _mean(rows, "top1") for rows in points], spread


def draw(runs: Runs, path: Path) -> None:
    """Budget against top-1, a panel for each network."""
    networks = list(dict.fromkeys(name for name, _, _ in runs))
    columns = min(4, len(networks))
    rows = -(-len(networks) // columns)
    fig = figure(3.4 * columns, 2.9 * rows + 0.5)
    colours = dict(zip((*CURVES.values(), BEST), ("#0b6e4f", "#58b09c", "#8a8d91", "#c8553d"), strict=True))
    shown: dict[str, object] = {}
    for i, network in enumerate(networks):
        axes = fig.add_subplot(rows, columns, i + 1)
        plain(axes)
        for label, (x, y, spread) in curves(runs, network).items():
            shown[label] = axes.errorbar(x, y, spread, color=colours[label], marker="o", markersize=3, linewidth=1.4,
                                         linestyle="--" if label == BEST else "-", capsize=2)
        dense = runs.get((network, "dense", "1"), {})
        if dense:
            axes.axhline(100 * _mean(list(dense.values()), "top1"), color="#444444", linewidth=0.8, linestyle=":")
        axes.set_title(network, fontsize=9)
        axes.set_xlim(0.47, 0.93)
        axes.set_ylim(bottom=0)
        if i % columns == 0:
            axes.set_ylabel("top-1, %")
        if i // columns == rows - 1:
            axes.set_xlabel("share of the MACs")
    fig.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    path = parser.parse_args().csv
    runs = read(path)
    path.with_suffix(".md").write_text(page(runs))
    draw(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
