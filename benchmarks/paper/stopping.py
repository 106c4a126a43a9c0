"""samples="auto": how many samples it takes, how near that comes to all 60,000, and what it costs in accuracy.

    python -m benchmarks.paper.stopping --data DATA

Each network is scored with samples="auto", in a random order for each scoring seed, and once on the whole training set
(taylor-sq, random gradient, channel groups); on the way there, the halves are compared at 32 samples, 64, 128, ...
Writes fashion-mnist-stopping.csv, .png and .md into --out; accuracies are means over the paper's 31 points.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastscore
from benchmarks.paper import data, training
from benchmarks.paper.agreement import flat, overlap
from benchmarks.paper.data import Images
from benchmarks.paper.evaluation import Evaluator
from fastscore import Scores
from fastscore.plots import figure, plain
from fastscore.scoring.options import AGREEMENT, AUTO_LEAST

BATCH = 32
FRACTION, SHARE = AGREEMENT
FIELDS = ("network", "training_seed", "scoring_seed", "kind", "samples", "overlap_of_halves", "overlap_with_all",
          "accuracy")


def on_the_way(model: nn.Module, x: Tensor, seed: int) -> Iterator[Scores]:
    """Scores on the first 32 samples of x, 64, 128, ..., and at last on all."""
    scores, start, end = None, 0, AUTO_LEAST
    while start < len(x):
        part = fastscore.score(model, x[start:end].split(BATCH), seed=seed, progress=False)
        scores = part if scores is None else scores.merge(part)
        yield scores
        start, end = end, 2 * end


def measure(model: nn.Module, train: Images, test: Images, seeds: list[int], stride: int = 31
            ) -> Iterator[dict[str, object]]:
    """The rows of one network, but for its name. kind: "way", "all" or "auto"."""
    evaluator = Evaluator(model, test, "groups")

    def accuracy(scores: Scores) -> str:
        curve = evaluator.curve(scores, stride=stride)
        return f"{sum(point['right'] / point['images'] for point in curve) / len(curve):.4f}"

    def row(seed: int, kind: str, scores: Scores) -> dict[str, object]:
        return {"scoring_seed": seed, "kind": kind, "samples": scores.samples,
                "overlap_of_halves": f"{scores.overlap(FRACTION):.4f}",
                "overlap_with_all": f"{overlap(flat(scores), flat(whole), FRACTION):.4f}",
                "accuracy": "" if kind == "way" else accuracy(scores)}

    orders = [torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    way = list(on_the_way(model, train.images[orders[0]], seeds[0]))
    whole = way[-1]
    for scores in way[:-1]:
        yield row(seeds[0], "way", scores)
    yield row(seeds[0], "all", whole)
    for seed, order in zip(seeds, orders, strict=True):
        yield row(seed, "auto", fastscore.score(model, (train.images[part] for part in order.split(BATCH)),
                                                samples="auto", seed=seed, progress=False))


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """Network -> rows."""
    found: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["network"], []).append(row)
    return found


def column(rows: list[dict[str, str]], kind: str, field: str) -> Tensor:
    """The values of a field in rows of a kind: float64 [R]."""
    return torch.tensor([float(row[field]) for row in rows if row["kind"] == kind], dtype=torch.float64)


def table(results: dict[str, list[dict[str, str]]]) -> str:
    """Markdown: a row for each network, mean ± standard deviation between trained networks and orders."""
    lines = ["| | samples | overlap of the halves | overlap with all | accuracy | accuracy with all |",
             "|---" + "|---:" * 5 + "|"]
    for network, rows in results.items():
        cells = [_cell(column(rows, "auto", "samples"), 1, 0),
                 *(_cell(column(rows, kind, field), 100, 1) for kind, field in (
                     ("auto", "overlap_of_halves"), ("auto", "overlap_with_all"), ("auto", "accuracy"),
                     ("all", "accuracy")))]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Tensor, scale: float, digits: int) -> str:
    values = scale * values
    return f"{values.mean():,.{digits}f}" + (f" ± {values.std():,.{digits}f}" if len(values) > 1 else "")


def draw(path: Path) -> Iterator[Path]:
    """Overlaps against samples, a panel for each network, and where "auto" stopped; the table."""
    results = read(path)
    drawing = figure(5.2 * len(results), 3.6)
    for axes, (network, rows) in zip(drawing.subplots(1, len(results), squeeze=False, sharey=True)[0], results.items(),
                                     strict=True):
        for field, colour, label in (("overlap_of_halves", "#0b5fa5", "between the halves"),
                                     ("overlap_with_all", "#d9730d", "with all 60,000")):
            for number, seed in enumerate(sorted({row["training_seed"] for row in rows})):
                own = [row for row in rows if row["training_seed"] == seed and row["kind"] == "way"]
                axes.plot([int(row["samples"]) for row in own], [float(row[field]) for row in own], color=colour,
                          linewidth=1.1, marker=".", markersize=4, label=None if number else label)
        stops = [row for row in rows if row["kind"] == "auto"]
        axes.plot([int(row["samples"]) for row in stops], [float(row["overlap_with_all"]) for row in stops], "x",
                  color="#b00020", label='where "auto" stopped')
        axes.axhline(SHARE, color="black", linewidth=0.6, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_title(network, fontsize=9)
        axes.set_xlabel("samples", fontsize=9)
        axes.set_ylabel(f"overlap of the {FRACTION:.0%} to prune", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        plain(axes)
    drawing.savefig(path.with_suffix(".png"), dpi=150)
    yield path.with_suffix(".png")
    path.with_suffix(".md").write_text(
        f'samples="auto" (halves that agree on {SHARE:.0%} of the {FRACTION:.0%} to prune) against the '
        "whole training set; %, mean ± standard deviation.\n\n" + table(results) + "\n")
    yield path.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.stopping", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST, as torchvision lays it out")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg6"])
    parser.add_argument("--epochs", type=int, default=3, help="of training, as in python -m benchmarks.paper")
    parser.add_argument("--training-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scoring-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--networks-folder", default="benchmarks/results/paper/networks")
    parser.add_argument("--out", default="benchmarks/results/paper")
    options = parser.parse_args()
    images = data.load("fashion-mnist", options.data, options.download)
    path = Path(options.out) / "fashion-mnist-stopping.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for network, seed in tqdm([(network, seed) for network in options.networks for seed in options.training_seeds]):
            model = training.trained(network, images, seed, options.epochs, Path(options.networks_folder))
            for row in measure(model, images.train, images.test, options.scoring_seeds):
                writer.writerow({"network": network, "training_seed": seed, **row})
            file.flush()
    for written in (path, *draw(path)):
        print(written)


if __name__ == "__main__":
    main()
