"""Tables of rows as a file, and as charts: times as fast as Torch-Pruning's Taylor, by model; how the cost grows.

    python -m benchmarks.peers.chart benchmarks/results/peers-cpu.csv    # draws them again
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import BASELINE
from benchmarks.peers.growth import FACTORS, OURS
from benchmarks.peers.measure import Row


class File:
    """Tables in one file, path: each the rows of one part, model, number and size of images, measured in one go.

    Raises SystemExit where the file has figures that depend on other facts.
    """

    def __init__(self, path: Path, facts: Mapping[str, str | int]) -> None:
        self.path, self.facts = path, facts
        self._tables: dict[tuple[object, ...], list[Row]] = {}
        if path.exists():
            rows, others = read_csv(path)
            if others != {name: str(value) for name, value in facts.items()}:
                raise SystemExit(f"{path}: its figures are of {others}, not of {dict(facts)}; write another file")
            for row in rows:
                self._tables.setdefault(_table(row), []).append(row)

    @property
    def rows(self) -> list[Row]:
        """Of all tables."""
        return [row for table in self._tables.values() for row in table]

    def add(self, rows: Sequence[Row]) -> None:
        """Write the rows of one table, in the place of those that it had before, if any."""
        self._tables[_table(rows[0])] = list(rows)
        write_csv(self.rows, self.facts, self.path)


def _table(row: Row) -> tuple[object, ...]:
    return row.part, row.model, row.images, row.size


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
    """The charts of what there is: passes as path's .png, growth beside it as -growth.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = "\n".join(f"{name} {value}" for name, value in facts.items() if name in ("processor", "allocator"))
    for part, ending, draw_on in (([row for row in rows if row.part == "pass"], ".png", _bars),
                                  ([row for row in rows if row.part in FACTORS], "-growth.png", _curves)):
        if part:
            figure = draw_on(part, pyplot)
            figure.suptitle(title, fontsize=8)
            figure.savefig(path.with_name(path.stem + ending), dpi=150, bbox_inches="tight")
            pyplot.close(figure)


def _bars(passes: Sequence[Row], pyplot: Any) -> Any:
    """A group of bars for each model and batch, a bar for each contestant, whiskers from least to most."""
    groups = list(dict.fromkeys((row.model, row.images, row.size) for row in passes))
    alike = len({group[1:] for group in groups}) == 1
    names = [name for name in dict.fromkeys(row.contestant for row in passes) if name != BASELINE]
    ours = [name for name in names if name.startswith("fastscore")]
    peers = [name for name in names if name not in ours]
    width = 0.85 / max(len(names), 1)
    figure, axes = pyplot.subplots(figsize=(2 + 1.9 * len(groups), 4.5), layout="constrained")
    shades = pyplot.get_cmap("Greys")
    for place, name in enumerate([*peers, *ours]):
        own = [row for row in passes if row.contestant == name and row.times_as_fast is not None]
        color = shades(0.25 + 0.6 * peers.index(name) / max(len(peers), 1)) if name in peers else \
            f"C{ours.index(name)}"
        at = [groups.index((row.model, row.images, row.size)) + (place - (len(names) - 1) / 2) * width for row in own]
        spread = [[row.times_as_fast - row.least for row in own], [row.most - row.times_as_fast for row in own]]
        axes.bar(at, [row.times_as_fast for row in own], width, yerr=spread, label=name, color=color,
                 error_kw={"linewidth": 0.6})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [model if alike else f"{model}\n{images} of {size}²"
                                         for model, images, size in groups])
    axes.set_ylabel(f"times as fast as\n{BASELINE}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    return figure


def _curves(rows: Sequence[Row], pyplot: Any) -> Any:
    """A panel for each factor: seconds for 100 images at each of its values; how many times as fast, at ours."""
    factors = [factor for factor in FACTORS if any(row.part == factor for row in rows)]
    figure, panels = pyplot.subplots(1, len(factors), figsize=(1 + 2.6 * len(factors), 3.2), squeeze=False,
                                     layout="constrained")
    for factor, axes in zip(factors, panels[0], strict=True):
        values = list(dict.fromkeys(row.model for row in rows if row.part == factor))
        for name, color in ((BASELINE, "0.5"), (OURS, "C1")):
            own = [row for row in rows if (row.part, row.contestant) == (factor, name) and row.seconds is not None]
            axes.plot([values.index(row.model) for row in own], [row.per_100_images for row in own], "o-",
                      color=color, markersize=3, label=name)
            for row in own if name == OURS else ():
                axes.annotate(f"{row.times_as_fast:.1f}×", (values.index(row.model), row.per_100_images), (0, 4),
                              textcoords="offset points", ha="center", fontsize=7)
        axes.set_xticks(range(len(values)), values, fontsize=7, rotation=30 if max(map(len, values)) > 4 else 0)
        axes.set_xlabel(FACTORS[factor], fontsize=8)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("seconds for 100 images", fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, ncols=2, loc="outside lower center",
                  frameon=False)
    return figure


def main() -> None:
    """Draw tables that were written before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.chart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    path = parser.parse_args().table
    draw(*read_csv(path), path)


if __name__ == "__main__":
    main()
