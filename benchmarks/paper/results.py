"""Curves read back: what `python -m benchmarks.paper` wrote, what the paper published, and a table of both."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

POINTS = 31
# in the training set: "all" samples
IMAGES = {"cifar100": 50000, "stl10": 5000, "fashion-mnist": 60000, "cifar10-jpeg": 50000}
PUBLISHED = Path(__file__).parent / "published.csv"
WORDS = {"taylorfo": "taylor", "taylorfo_abs": "taylor-abs", "taylorfo_sq": "taylor-sq", "Molchanov_BN": "molchanov-bn",
         "Molchanov_group": "molchanov-group", "rand": "random", "norm": "norm"}  # the paper's -> ours


class Key(NamedTuple):
    """What curves are drawn together for: those of all seeds."""

    network: str
    samples: int
    units: str
    variant: str
    compensated: bool


@dataclass(frozen=True)
class Results:
    """runs: key -> float64 [R, 31], a curve of test accuracies in [0, 1] for each training and scoring seed.
    seeds: key -> which (training, scoring) seeds these are, ascending.
    removed: (network, units) -> how many units each point is without."""

    dataset: str
    runs: Mapping[Key, Tensor]
    seeds: Mapping[Key, tuple[tuple[str, str], ...]]
    removed: Mapping[tuple[str, str], tuple[int, ...]]

    def values(self, field: str, **fixed: object) -> list[Any]:
        """The values of a field among the keys with the values `fixed`: ascending."""
        return sorted({getattr(key, field) for key in self.runs
                       if all(getattr(key, name) == value for name, value in fixed.items())})


def read(path: Path) -> Results:
    """The complete curves of a CSV; of one that is there twice, the later. Raises ValueError where there is none."""
    curves: dict[tuple[Key, str, str], dict[int, float]] = defaultdict(dict)
    dataset = ""
    for row in whole_rows(path):
        dataset = row["dataset"]
        samples = IMAGES[dataset] if row["samples"] == "all" else int(row["samples"])
        key = Key(row["network"], samples, row["units"], row["variant"], bool(int(row["compensated"])))
        curves[key, row["training_seed"], row["scoring_seed"]][int(row["removed"])] = \
            int(row["right"]) / int(row["images"])
    complete = {run: points for run, points in curves.items() if len(points) == POINTS}
    if not complete:
        raise ValueError(f"{path}: no curve of {POINTS} points in it; run python -m benchmarks.paper first")
    return _results(dataset, [(key, seeds, points) for (key, *seeds), points in sorted(complete.items())])


def whole_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV, but for a last one that an interruption has torn: a line without its end."""
    with path.open(newline="") as file:
        yield from csv.DictReader(line for line in file if line.endswith("\n"))


def published(dataset: str, network: str) -> Results | None:
    """The paper's curves of a network (arXiv 2310.20203, figures); None where it has none."""
    found = []
    with PUBLISHED.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["dataset"], row["network"]) == (dataset, network):
                for name in list(row)[5:]:
                    variant = ":".join(WORDS[word] for word in name.split(":"))
                    found.append((Key(network, int(row["samples"]), "norms", variant, False),
                                  int(row["neurons_pruned"]), float(row[name])))
    curves: dict[Key, dict[int, float]] = defaultdict(dict)
    for key, removed, accuracy in found:
        curves[key][removed] = accuracy
    return _results(dataset, [(key, ("", ""), points) for key, points in curves.items()]) if found else None


def _results(dataset: str, curves: Iterable[tuple[Key, Sequence[str], dict[int, float]]]) -> Results:
    runs: dict[Key, list[list[float]]] = defaultdict(list)
    seeds: dict[Key, list[tuple[str, str]]] = defaultdict(list)
    removed: dict[tuple[str, str], tuple[int, ...]] = {}
    for key, (training, scoring), points in curves:
        counts = tuple(sorted(points))
        if removed.setdefault((key.network, key.units), counts) != counts:
            raise ValueError(f"{key.network}: curves over different numbers of removed units cannot be averaged")
        runs[key].append([points[count] for count in counts])
        seeds[key].append((training, scoring))
    return Results(dataset, {key: torch.tensor(rows, dtype=torch.float64) for key, rows in runs.items()},
                   {key: tuple(rows) for key, rows in seeds.items()}, removed)


def table(results: Results, network: str, units: str) -> str:
    """Markdown: for each variant and D the mean accuracy (%) over the curve, over all runs, ± its standard deviation
    between them; below it, in italics, the paper's where it has one."""
    samples = results.values("samples", network=network, units=units)
    paper = published(results.dataset, network) if units == "norms" else None
    lines = ["| | " + " | ".join(f"D = {count:,}" for count in samples) + " |", "|---" + "|---:" * len(samples) + "|"]
    rows = {(key.variant, key.compensated) for key in results.runs if (key.network, key.units) == (network, units)}
    for variant, compensated in sorted(rows):
        cells = []
        for count in samples:
            key = Key(network, count, units, variant, compensated)
            theirs = paper.runs.get(key) if paper else None
            cells.append(_cell(results.runs.get(key)) + ("" if theirs is None else f" *({100 * theirs.mean():.1f})*"))
        lines.append(f"| {variant}{', compensated' if compensated else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(runs: Tensor | None) -> str:
    if runs is None:
        return ""
    means = 100 * runs.mean(1)
    return f"{means.mean():.1f}" + (f" ± {means.std():.1f}" if len(means) > 1 else "")
