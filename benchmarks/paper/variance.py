"""What agreement a backward pass buys: distributions of the random gradient, probes of a sample, samples.

    python -m benchmarks.paper.variance --data DATA

Two halves of D training images each are scored apart (taylor-sq, normalised, channel groups), again and again; how far
the two rankings agree is set against the backward passes that each half took. Writes fashion-mnist-variance.csv, .png
and .md into --out, with the mean accuracy over the paper's 31 points for one probe and for the exact mean square.

Scores are linear in the output's gradient before they are squared, so ten backward passes of each sample, one for each
class, hold the scores of every random gradient: v·u, where u [K, C] is the sample's change of outputs.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paper import data, training
from benchmarks.paper.agreement import overlap, spearman
from benchmarks.paper.data import Images
from benchmarks.paper.evaluation import Evaluator
from fastscore import fingerprints
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.plots import figure, plain
from fastscore.scoring import gradients

FRACTION = 0.3  # of the channels that would be pruned
HALVES, PROBES, REPEATS = (10, 100, 1000), (1, 2, 5, 10), 5
RANDOM = ("normal", "rademacher", "orthogonal")
CURVES = {("normal", 1), ("rademacher", 1), ("basis", 10)}  # (distribution, probes) whose accuracy is measured,
CURVE_SAMPLES = 100  # on so many
MARKERS = "osD"  # of HALVES
FIELDS = ("network", "training_seed", "repeat", "distribution", "center", "samples", "probes", "passes", "spearman",
          "overlap", "accuracy")


def output_changes(model: nn.Module, x: Tensor, batch: int = 50) -> dict[str, Tensor]:
    """u = ∂z/∂gate of every channel group of `model`: group -> [N, K, C]."""
    eval_model = evaluation_copy(model)
    groups = trace(eval_model, x[:1]).groups
    gates: dict[str, Tensor] = {}

    def gate(edges: list[tuple[str, Any]]) -> Callable[..., tuple[Tensor]]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            dim = -1 if isinstance(module, nn.Linear) else 1
            factor = args[0].new_ones(len(args[0]), args[0].shape[dim])
            for name, edge in edges:
                factor = factor.index_copy(1, edge.index, gates[name][:, edge.channel])
            return (args[0] * (factor if dim == -1 else factor[:, :, None, None]),)

        return hook

    edges: dict[str, list[tuple[str, Any]]] = {}
    for group in groups:
        for edge in group.edges:
            edges.setdefault(edge.layer, []).append((group.name, edge))
    for layer, read in edges.items():
        eval_model.get_submodule(layer).register_forward_pre_hook(gate(read))
    parts: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    for images in x.split(batch):
        gates |= {group.name: images.new_ones(len(images), group.channels).requires_grad_() for group in groups}
        output = eval_model(images)
        rows = [torch.autograd.grad(output[:, k].sum(), list(gates.values()), retain_graph=True)
                for k in range(output.shape[1])]
        for name, columns in zip(gates, zip(*rows, strict=True), strict=True):
            parts[name].append(torch.stack(columns, 1))
    return {name: torch.cat(found) for name, found in parts.items()}


def importance(u: Tensor, ids: Tensor, distribution: str, center: bool, probes: int, seed: int = 0) -> Tensor:
    """taylor-sq of normalised random gradients: u [N, K, C], sample ids [N] -> float64 [C]."""
    total = u.new_zeros(u.shape[2], dtype=torch.float64)
    for probe in range(probes):
        v = gradients.random_gradient(u[:, :, 0], ids, seed, probe, distribution, True, center)
        total += torch.einsum("nk,nkc->nc", v, u).double().square().sum(0)
    return total / len(u) / probes


def ways(classes: int) -> Iterator[tuple[str, bool, int]]:
    """(distribution, center, probes) of all that is compared; "basis" is probes="exact"."""
    for center in (False, True):
        for distribution in RANDOM:
            for probes in PROBES:
                yield distribution, center, probes
        yield "basis", center, classes


def measure(model: nn.Module, train: Images, test: Images, halves: tuple[int, ...] = HALVES, repeats: int = REPEATS,
            stride: int = 31) -> Iterator[dict[str, object]]:
    """The rows of one network, but for its name; `train` holds at least two of the largest halves."""
    by_group = output_changes(model, train.images)
    u, ids = torch.cat(list(by_group.values()), 2), fingerprints.sample_ids(train.images)
    evaluator = Evaluator(model, test, "groups")
    for repeat in range(repeats):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(repeat))
        for samples in halves:
            parts = order[:samples], order[samples:2 * samples]
            for distribution, center, probes in ways(u.shape[1]):
                one, other = (importance(u[part], ids[part], distribution, center, probes, repeat) for part in parts)
                row = {"repeat": repeat, "distribution": distribution, "center": int(center), "samples": samples,
                       "probes": probes, "passes": samples * probes, "spearman": f"{spearman(one, other):.4f}",
                       "overlap": f"{overlap(one, other, FRACTION):.4f}", "accuracy": ""}
                if repeat == 0 and samples == CURVE_SAMPLES and (distribution, probes) in CURVES:
                    scores = dict(zip(by_group, one.split([part.shape[2] for part in by_group.values()]), strict=True))
                    curve = evaluator.curve(scores, stride=stride)
                    row["accuracy"] = f"{sum(point['right'] / point['images'] for point in curve) / len(curve):.4f}"
                yield row


def table(rows: list[dict[str, str]], center: str) -> str:
    """Markdown: overlap (%) of two halves, mean ± standard deviation over networks and repeats; center: "0" or "1"."""
    columns = sorted({(int(row["samples"]), int(row["probes"])) for row in rows if row["probes"] != "5"})
    lines = ["| | " + " | ".join(f"{samples:,} × {probes}" for samples, probes in columns) + " |",
             "|---" + "|---:" * len(columns) + "|"]
    for network in sorted({row["network"] for row in rows}):
        found = grouped([row for row in rows if row["network"] == network])
        for distribution in (*RANDOM, "basis"):
            cells = [found[distribution, center, str(samples)].get(samples * probes) for samples, probes in columns]
            words = "exact" if distribution == "basis" else distribution
            lines.append(f"| {network}, {words} | " + " | ".join(
                "" if values is None else f"{100 * values.mean():.1f} ± {100 * values.std():.1f}" for values in cells)
                + " |")
    return "\n".join(lines)


def accuracies(rows: list[dict[str, str]]) -> str:
    """Markdown: mean accuracy (%) over the 31 points, on CURVE_SAMPLES samples, ± standard deviation over networks."""
    kinds = [(distribution, center, probes) for distribution, probes in sorted(CURVES) for center in "01"]
    lines = ["| | " + " | ".join(("exact" if name == "basis" else name) + (", centred" if center == "1" else "")
                                 for name, center, _ in kinds) + " |", "|---" + "|---:" * len(kinds) + "|"]
    for network in sorted({row["network"] for row in rows}):
        found = grouped([row for row in rows if row["network"] == network], "accuracy")
        cells = [100 * found[name, center, str(CURVE_SAMPLES)][CURVE_SAMPLES * probes]
                 for name, center, probes in kinds]
        lines.append(f"| {network} | " + " | ".join(
            f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "") for values in cells) + " |")
    return "\n".join(lines)


def draw(path: Path) -> Iterator[Path]:
    """From the CSV: overlap against backward passes, a panel for each network and for centred gradients or not; tables.
    """
    from matplotlib.lines import Line2D

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    networks, sizes = sorted({row["network"] for row in rows}), sorted({row["samples"] for row in rows}, key=int)
    colours = dict(zip((*RANDOM, "basis"), ("#0b5fa5", "#c9a227", "#3f8f4f", "#b00020"), strict=True))
    drawing = figure(10.5, 3.2 * len(networks) + 0.5)
    panels = drawing.subplots(len(networks), 2, squeeze=False, sharex=True, sharey="row")
    for network, line in zip(networks, panels, strict=True):
        for center, axes in zip("01", line, strict=True):
            for (distribution, _, samples), points in grouped(
                    [row for row in rows if (row["network"], row["center"]) == (network, center)]).items():
                passes = sorted(points)
                axes.errorbar(passes, [points[count].mean() for count in passes],
                              [points[count].std() for count in passes], color=colours[distribution], linewidth=1.2,
                              marker=MARKERS[sizes.index(samples)], markersize=4, elinewidth=0.7)
            axes.set_xscale("log")
            axes.set_title(f"{network}{', centred' if center == '1' else ''}", fontsize=9)
            axes.tick_params(labelsize=8)
            plain(axes)
        line[0].set_ylabel(f"overlap of the {FRACTION:.0%} to prune", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("backward passes of a sample, in all", fontsize=9)
    drawing.legend([*(Line2D([], [], color=colour) for colour in colours.values()),
                    *(Line2D([], [], color="black", marker=marker, linestyle="") for marker in MARKERS[:len(sizes)])],
                   [*RANDOM, "exact", *(f"{int(samples):,} samples" for samples in sizes)], loc="outside lower center",
                   ncols=7, frameon=False, fontsize=9)
    drawing.savefig(path.with_suffix(".png"), dpi=150)
    yield path.with_suffix(".png")
    path.with_suffix(".md").write_text(
        f"### Overlap of halves\n\nOf the {FRACTION:.0%} of channels that each half of samples × probes would prune, "
        "%, mean ± standard deviation over networks and repeats.\n\n" + table(rows, "0")
        + "\n\n### Overlap of halves, centred\n\n" + table(rows, "1") + "\n\n### Accuracy\n\nMean test accuracy (%) "
        f"over the 31 points, scored on {CURVE_SAMPLES} samples, with one probe each or all.\n\n{accuracies(rows)}\n")
    yield path.with_suffix(".md")


def grouped(rows: list[dict[str, str]], field: str = "overlap") -> dict[tuple[str, str, str], dict[int, Tensor]]:
    """(distribution, center, samples) -> passes -> what networks and repeats measured, float64 [R]."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row[field]:
            key = row["distribution"], row["center"], row["samples"]
            found.setdefault(key, {}).setdefault(int(row["passes"]), []).append(float(row[field]))
    return {key: {passes: torch.tensor(values, dtype=torch.float64) for passes, values in points.items()}
            for key, points in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.variance", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST, as torchvision lays it out")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg6"])
    parser.add_argument("--epochs", type=int, default=3, help="of training, as in python -m benchmarks.paper")
    parser.add_argument("--training-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--networks-folder", default="benchmarks/results/paper/networks")
    parser.add_argument("--out", default="benchmarks/results/paper")
    options = parser.parse_args()
    images = data.load("fashion-mnist", options.data, options.download)
    order = torch.randperm(len(images.train.labels), generator=torch.Generator().manual_seed(0))[:2 * max(HALVES)]
    train = Images(images.train.images[order], images.train.labels[order])
    path = Path(options.out) / "fashion-mnist-variance.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for network, seed in tqdm([(network, seed) for network in options.networks for seed in options.training_seeds]):
            model = training.trained(network, images, seed, options.epochs, Path(options.networks_folder))
            for row in measure(model, train, images.test):
                writer.writerow({"network": network, "training_seed": seed, **row})
            file.flush()
    for written in (path, *draw(path)):
        print(written)


if __name__ == "__main__":
    main()
