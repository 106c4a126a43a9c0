"""Which optimizer, learning rate and temperature distill() should have: networks on scikit-learn's digits, pruned hard.

    python -m benchmarks.recovery.distillation --out benchmarks/results/recovery/distillation.csv

Trains a network for each seed, prunes it without repair, and distills it from many and from few unlabelled images; what
is left is judged on test images that nothing else has seen.
"""

import argparse
import copy
import csv
import itertools

import torch

import fastscore
from fastscore.cli import digits
from fastscore.recovery.divergence import divergence

RATES = {"sgd": (0.003, 0.01, 0.03, 0.1), "adamw": (0.0003, 0.001, 0.003, 0.01)}
TEMPERATURES = (1.0, 2.0, 4.0)


def main() -> None:
    """Print a row for every way, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.3])
    parser.add_argument("--images", type=int, nargs="+", default=[1198, 200])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", metavar="CSV")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        split = digits.Digits.split(seed)
        torch.manual_seed(seed)
        model = digits.network()
        digits.train(model, *split.train, digits.EPOCHS, 0.1, lambda: None)
        images, test = split.train[0], split.test[0]
        scores = fastscore.score(model, images.split(256), progress=False)
        for macs, count in itertools.product(arguments.macs, arguments.images):
            pruned = fastscore.prune(model, scores, images[:1], macs=macs).model
            for optimizer, temperature in itertools.product(RATES, TEMPERATURES):
                for lr in RATES[optimizer]:
                    smaller = copy.deepcopy(pruned)
                    report = fastscore.distill(model, smaller, images[:count].split(64), steps=arguments.steps, lr=lr,
                                               optimizer=optimizer, temperature=temperature, patience=None, looks=5,
                                               progress=False)
                    with torch.no_grad():
                        left = divergence([model.eval()(test)], [smaller.eval()(test)])
                    rows.append({"seed": seed, "macs": macs, "images": count, "optimizer": optimizer, "lr": lr,
                                 "temperature": temperature, "held_out_kl": round(report.best.kl, 4),
                                 "test_agreement": round(left.agreement, 4), "test_kl": round(left.kl, 4)})
                    print(*rows[-1].values(), flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
