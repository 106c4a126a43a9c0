"""The paper's protocol, from training to accuracy curves: arXiv 2310.20203, section 4.

    python -m benchmarks.paper --dataset fashion-mnist --data DATA --epochs 3 --samples 10 100 1000 --jobs 2
    python -m benchmarks.paper --dataset cifar100 --data DATA --download --device cuda
    python -m benchmarks.paper --dataset stl10 --data DATA --download --device cuda

Trains the networks, scores each once on D training images with every variant, removes P of N units in 31 steps and
writes the test accuracies to OUT/DATASET.csv. What is there already is not done again: the same command goes on after
an interruption. `python -m benchmarks.paper.figures` draws.
"""

import argparse
import csv
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from benchmarks.paper import data, training
from benchmarks.paper.evaluation import POINTS
from benchmarks.paper.protocol import EXPERIMENTS, FIELDS, KEY, Work, curves
from benchmarks.paper.variants import Variant

# data set -> networks, D, epochs (the paper's; the last two are not in it)
DEFAULTS = {
    "cifar100": (["resnet20", "resnet56", "vgg19"], ["2", "10", "103", "all"], 200),
    "stl10": (["resnet18"], ["2", "71", "595", "all"], 200),
    "fashion-mnist": (["resnet20", "vgg6"], ["10", "100", "1000", "all"], 3),
    "cifar10-jpeg": (["resnet20-padded", "resnet56-padded"], ["10", "100", "1000"], 1),  # from recovery.adapt
}


def jobs(options: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[tuple[Work, list[tuple[Variant, bool]]]]:
    """The work that is left."""
    for samples in options.samples:
        for experiment in options.experiments:
            for scoring_seed in options.scoring_seeds:
                for training_seed in options.training_seeds:
                    for network in options.networks:
                        work = Work(options, experiment, samples, scoring_seed, training_seed, network)
                        _, variants, kinds = EXPERIMENTS[experiment]
                        wanted = [(variant, compensated) for variant in variants for compensated in kinds
                                  if work.key(variant, compensated) not in done]
                        if wanted:
                            yield work, wanted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(DEFAULTS), default="fashion-mnist")
    parser.add_argument("--data", required=True, help="folder of the data set's files, as torchvision lays them out")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch them")
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--samples", nargs="+", help="D: how many training images to score on, or all")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--training-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scoring-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--stride", type=int, default=1, help="test each point of a curve on every STRIDEth test image "
                        "only, from its own first one on: with 31 a curve sees each image once (default: all images)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--networks-folder", default="benchmarks/results/paper/networks",
                        help="where trained networks are kept")
    parser.add_argument("--out", default="benchmarks/results/paper")
    options = parser.parse_args()
    networks, samples, epochs = DEFAULTS[options.dataset]
    options.networks, options.samples = options.networks or networks, options.samples or samples
    options.epochs = options.epochs or epochs

    images = data.load(options.dataset, options.data, options.download, options.device)
    for seed in options.training_seeds:
        for network in options.networks:
            training.trained(network, images, seed, options.epochs, Path(options.networks_folder))
    path = Path(options.out) / f"{options.dataset}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    left = list(jobs(options, complete(path)))
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # workers leave Ctrl-C to this process, which ends them
    with path.open("a", newline="") as file, multiprocessing.get_context("spawn").Pool(options.jobs, *quiet) as pool, \
            tqdm(total=sum(len(wanted) for _, wanted in left), unit=" curves") as bar:
        writer = csv.DictWriter(file, FIELDS)
        try:
            for rows in pool.imap_unordered(curves, left):
                writer.writerows(rows)
                file.flush()
                bar.update(len(rows) // POINTS)
        except KeyboardInterrupt:
            raise SystemExit(f"interrupted; what is done is in {path}, and the same command goes on") from None


def complete(path: Path) -> set[tuple[str, ...]]:
    """The keys of the curves that a CSV holds whole; a last line that an interruption has torn is cut off."""
    if not path.exists():
        return set()
    written = path.read_bytes()
    if not written.endswith(b"\n"):
        path.write_bytes(written[:written.rfind(b"\n") + 1])
    points: dict[tuple[str, ...], set[str]] = defaultdict(set)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            points[tuple(row[field] for field in KEY)].add(row["removed"])
    return {key for key, removed in points.items() if len(removed) == POINTS}


if __name__ == "__main__":
    main()
