"""A table of rows as a file, and as a bar chart: times as fast as Torch-Pruning's Taylor, by model.

    python -m benchmarks.peers.chart benchmarks/results/peers-cpu.csv    # draws it again
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.peers.contestants import BASELINE
from benchmarks.peers.measure import Row


def write_csv(rows: Sequence[Row], facts: Mapping[str, str | int], path: Path) -> None:
    """A line for each row: its fields, seconds for 100 images, and what the figures depend on."""
    lines = [{**{name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(row).items()},
              "seconds_per_100_images": None if row.per_100_images is None else f"{row.per_100_images:.4g}", **facts}
             for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, facts), as `write_csv` took them."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    numbers = {"images": int, "size": int} | {name: float for name in
                                             ("seconds", "peak_mib", "times_as_fast", "least", "most")}
    names = [field.name for field in fields(Row)]
    rows = [Row(**{name: (numbers[name](line[name]) if line[name] else None) if name in numbers else line[name]
                   for name in names}) for line in lines]
    return rows, {name: value for name, value in lines[0].items() if name not in (*names, "seconds_per_100_images")}


def draw(rows: Sequence[Row], facts: Mapping[str, str | int], path: Path) -> None:
    """The passes: a group of bars for each model, a bar for each contestant, whiskers from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = [row for row in rows if row.part == "pass"]
    models = list(dict.fromkeys(row.model for row in passes))
    contestants = [name for name in dict.fromkeys(row.contestant for row in passes) if name != BASELINE]
    width = 0.85 / max(len(contestants), 1)
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(models), 4.5))
    shades = pyplot.get_cmap("Greys")
    ours = [name for name in contestants if name.startswith("fastscore")]
    peers = [name for name in contestants if name not in ours]
    contestants = [*peers, *ours]
    for place, name in enumerate(contestants):
        own = {row.model: row for row in passes if row.contestant == name and row.times_as_fast is not None}
        color = shades(0.25 + 0.6 * peers.index(name) / max(len(peers), 1)) if name in peers else \
            f"C{ours.index(name)}"
        at = [models.index(model) + (place - (len(contestants) - 1) / 2) * width for model in own]
        heights = [row.times_as_fast for row in own.values()]
        spread = [[row.times_as_fast - row.least for row in own.values()],
                  [row.most - row.times_as_fast for row in own.values()]]
        axes.bar(at, heights, width, yerr=spread, label=name, color=color, error_kw={"linewidth": 0.6})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel(f"times as fast as\n{BASELINE}")
    axes.set_title("\n".join(f"{name} {value}" for name, value in facts.items() if name in ("processor", "allocator")),
                   fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Draw a table that was written before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.chart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    path = parser.parse_args().table
    draw(*read_csv(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
