"""After fine-tuning: does the choice of channels still matter, and which one ends ahead?

    python -m benchmarks.recovery.finetuning --data DATA --depth 20

At 2.11 and 2.57 times fewer MACs (the operating points of Torch-Pruning's published ResNet-56): each choice is cut,
fine-tuned for --steps steps of 128 images with each of --rates, judged on 2,000 held-out training images, and with the
best of these rates trained from further seeds; all are judged on 4,000 test images. --objective labels: cross-entropy;
distill: fastscore.distill, which reads no label. Appends to OUT/finetuning.csv; what is there is not done again.
`--table` writes OUT/finetuning.md.
"""

import argparse
import copy
import csv
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import fastscore
from benchmarks.paper.data import Images
from benchmarks.paper.training import accuracy, augment
from benchmarks.recovery.__main__ import write
from benchmarks.recovery.adapt import adapt
from benchmarks.recovery.contestants import DEFAULT, FILTER_NORM, FORMER, MEAN, smaller
from benchmarks.recovery.networks import NETWORKS, Task
from benchmarks.recovery.page import cell
from benchmarks.recovery.peers import macs

SPEEDUPS = (2.11, 2.57)
METHODS = (DEFAULT, MEAN, "L2 norm / default", "tp magnitude local", "tp magnitude global", "random / default",
           FILTER_NORM, FORMER)
FIELDS = ("network", "speedup", "method", "objective", "steps", "rate", "seed", "held_out", "test", "before", "macs",
          "params", "widths")
KEY = FIELDS[:7]
HELD_OUT, BATCH = 2000, 128


class Augmented:
    """Batches of moved and mirrored images, other ones at every reading."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.draw = images, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(len(self.images), generator=self.draw).split(BATCH)[:len(self)]:
            yield augment(self.images[index], self.draw)


@dataclass(frozen=True)
class Study:
    """What all runs share: the images, the objective, how many steps."""

    task: Task
    objective: str
    steps: int

    def tuned(self, model: nn.Module, rate: float, seed: int) -> nn.Module:
        """A copy of `model`, fine-tuned."""
        model, train = copy.deepcopy(model), self.train
        if self.objective == "labels":
            return adapt(model, train, self.steps, BATCH, rate, seed)
        fastscore.distill(self.task.model, model, Augmented(train.images, seed), steps=self.steps, optimizer="sgd",
                          lr=rate, held_out=list(self.held_out().images.split(500)), seed=seed, progress=False)
        return model.eval()

    def part(self, which: slice) -> Images:
        """Some of the training images in an order that is always the same."""
        order = torch.randperm(len(self.task.images.labels), generator=torch.Generator().manual_seed(1))[which]
        return Images(self.task.images.images[order], self.task.images.labels[order])

    @cached_property
    def train(self) -> Images:
        """Training images, but for those held out."""
        return self.part(slice(HELD_OUT, None))

    def held_out(self) -> Images:
        """Training images that no run trains on."""
        return self.part(slice(HELD_OUT))


def widths(model: nn.Module) -> str:
    """Of each stage the outputs of its blocks' first convolutions, on average: stages apart by a slash."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, layer in model.named_modules():
        if name.startswith("layer") and name.endswith("conv1") and isinstance(layer, nn.Conv2d):
            found[name.split(".")[0]].append(layer.out_channels)
    return "/".join(f"{sum(row) / len(row):.1f}" for _, row in sorted(found.items()))


def done(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Key -> row."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(FIELDS) + "\n")
    with path.open(newline="") as file:
        return {tuple(row[field] for field in KEY): row for row in csv.DictReader(file)}


def run(network: str, study: Study, speedup: float, method: str, rates: list[float], seeds: list[int], path: Path,
        scores: Path) -> None:
    """The rows of one method at one operating point that the CSV at `path` does not have."""
    calibration, judged = study.task.draw(0)
    dense = macs(study.task.model, judged.images), sum(p.numel() for p in study.task.model.parameters())
    found: nn.Module | None = None

    def row(rate: float, seed: int) -> dict[str, str]:
        nonlocal found
        key = tuple(map(str, (network, speedup, method, study.objective, study.steps, rate, seed)))
        if key not in done(path):
            if found is None:
                found = next(iter(smaller(study.task, calibration.images, {1 / speedup: [method]}, 0, scores))).model
            tuned = study.tuned(found, rate, seed)
            shares = macs(found, judged.images) / dense[0], sum(p.numel() for p in found.parameters()) / dense[1]
            figures = accuracy(tuned, study.held_out()), accuracy(tuned, judged), accuracy(found, judged)
            write(path, [*key, *(f"{value:.4f}" for value in (*figures, *shares)), widths(found)])
        return done(path)[key]

    best = max(rates, key=lambda rate: float(row(rate, seeds[0])["held_out"]))
    for seed in seeds[1:]:
        row(best, seed)


def table(path: Path) -> str:
    """Markdown, of the rates that were best on held-out images."""
    rows: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for found in done(path).values():
        rows[tuple(found[field] for field in ("network", "objective", "steps", "speedup", "method"))][
            found["rate"]].append(found)
    lines = ["Written by `python -m benchmarks.recovery.finetuning --table`. Top-1 on 4,000 test images in %, "
             "mean ± standard deviation between training seeds; the learning rate is the best of the sweep on held-out "
             "images. Widths: inner channels of a block, average of each stage.", "",
             "| network | objective, steps | fewer MACs | choice | before | after | seeds | rate | MACs | parameters | "
             "widths |", "|---|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for (network, objective, steps, speedup, method), by_rate in sorted(rows.items()):
        rate, best = max(by_rate.items(), key=lambda pair: float(pair[1][0]["held_out"]))
        one = best[0]
        lines.append(f"| {network} | {objective}, {steps} | {speedup}x | {method} | {100 * float(one['before']):.1f} | "
                     f"{cell((100 * float(row['test']) for row in best), 1)} | {len(best)} | {rate} | {one['macs']} | "
                     f"{one['params']} | {one['widths']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.finetuning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--objective", default="labels", choices=("labels", "distill"))
    parser.add_argument("--speedups", nargs="+", type=float, default=list(SPEEDUPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scores", type=Path, help="folder in which scores are kept (default: DATA/scores)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    parser.add_argument("--table", action="store_true", help="train nothing, write the table of what is there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")
    path = options.out / "finetuning.csv"
    if options.table:
        path.with_suffix(".md").write_text(table(path))
        return
    name = f"resnet{options.depth}"
    study = Study(NETWORKS[name](options.data), options.objective, options.steps)
    for speedup in options.speedups:
        for method in options.methods:
            run(name, study, speedup, method, options.rates, options.seeds, path,
                (options.scores or options.data / "scores") / f"{name}-0")


if __name__ == "__main__":
    main()
