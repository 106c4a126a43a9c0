"""Which optimizer, learning rate and temperature distill() should have: networks that were pruned hard.

    python -m benchmarks.recovery.distillation --out benchmarks/results/recovery/distillation.csv
    python -m benchmarks.recovery.distillation --network resnet20 --data DATA --macs 0.5 --images 1000 --steps 60

Without --network, one trained on scikit-learn's digits for each seed; with it, one of benchmarks/recovery/networks.py,
of which a seed draws the images. Each is pruned without repair, and distilled from many and from few unlabelled images;
what is left is judged on images that nothing else has seen. Rows are appended to --out.
"""

import argparse
import copy
import csv
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

import fastscore
from benchmarks.recovery.networks import NETWORKS
from fastscore.cli import digits
from fastscore.recovery.divergence import divergence

RATES = {"sgd": (0.003, 0.01, 0.03, 0.1), "adamw": (0.0003, 0.001, 0.003, 0.01)}
TEMPERATURES = (1.0, 2.0, 4.0)
BATCH, JUDGES = 64, 1000


def trained(network: str | None, data: Path | None, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, images to learn from, images to judge by)."""
    if network is not None:
        assert data is not None
        task = NETWORKS[network](data)
        calibration, judged = task.draw(seed)
        return task.model, calibration.images, judged.images[:JUDGES]
    split = digits.Digits.split(seed)
    torch.manual_seed(seed)
    model = digits.network()
    digits.train(model, *split.train, 15, 0.1, lambda: None)
    return model, split.train[0], split.test[0]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """In evaluation mode, batch by batch."""
    return [model.eval()(x) for x in images.split(250)]


def main() -> None:
    """Print a row for every way, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), help="default: one trained on digits")
    parser.add_argument("--data", type=Path, help="of --network: see benchmarks/recovery/images.py")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.3])
    parser.add_argument("--images", type=int, nargs="+", default=[1198, 200])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--optimizers", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--clip", type=float, default=1.0, help="the longest gradient")
    parser.add_argument("--out", metavar="CSV", type=Path)
    arguments = parser.parse_args()
    if arguments.network and not arguments.data:
        parser.error("--network: its images are in --data DIR")
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        model, images, test = trained(arguments.network, arguments.data, seed)
        scores = fastscore.score(model, images.split(BATCH), progress=False)
        expected = outputs(model, test)
        for macs, count in itertools.product(arguments.macs, arguments.images):
            pruned = fastscore.prune(model, scores, images[:1], macs=macs).model
            for optimizer, temperature in itertools.product(arguments.optimizers, arguments.temperatures):
                for lr in RATES[optimizer]:
                    smaller = copy.deepcopy(pruned)
                    report = fastscore.distill(model, smaller, images[:count].split(BATCH), steps=arguments.steps,
                                               lr=lr, optimizer=optimizer, temperature=temperature,
                                               clip=arguments.clip, patience=None, looks=5, progress=False)
                    left = divergence(expected, outputs(smaller, test))
                    row = {"network": arguments.network or "digits", "steps": arguments.steps, "seed": seed,
                           "macs": macs, "images": count, "optimizer": optimizer, "lr": lr, "temperature": temperature,
                           "held_out_kl": round(report.best.kl, 4), "test_agreement": round(left.agreement, 4),
                           "test_kl": round(left.kl, 4), "clip": arguments.clip}
                    print(*row.values(), flush=True)
                    if arguments.out:
                        append(arguments.out, row)


def append(path: Path, row: dict[str, object]) -> None:
    """One row more, at once; a new file begins with the names of the columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
