"""One file of scores, a fleet of networks: scoring is done once, every budget is a matter of a moment.

    python examples/budgets.py --out fleet
"""

import argparse
import csv
from pathlib import Path

import torch

import fastscore
from fastscore.cli import digits  # real images and a small ResNet; put yours in their place


def main(out: str = "fleet", budgets: tuple[float, ...] = (0.8, 0.6, 0.4), epochs: int = 4) -> list[dict[str, float]]:
    """Returns the rows of fleet.csv."""
    torch.manual_seed(0)
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    data = digits.Digits.split(0)
    model = digits.network()
    digits.train(model, *data.train, epochs, 0.1, done=lambda: None)

    kept = folder / "scores.safetensors"  # the one thing that takes time on a large network, and may run elsewhere
    fastscore.score(model, data.train[0][:512].split(64), progress=False).save(kept)

    scores, rows = fastscore.Scores.load(kept), []
    for budget in budgets:
        result = fastscore.prune(model, scores, data.train[0][:2], macs=budget)
        fastscore.save_pruned(result, folder / f"macs-{budget:g}.safetensors")
        report = result.report
        rows.append({"budget": budget, "macs": report.macs[1], "params": report.params[1],
                     "accuracy": round(digits.accuracy(result.model, *data.test), 4)})
        print(rows[-1])
    with (folder / "fleet.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="fleet", help="folder (default: %(default)s)")
    folder = parser.parse_args().out
    main(folder)
    print(f"wrote {folder}/scores.safetensors, {folder}/fleet.csv and a network for each budget, for "
          "fastscore.load_pruned(digits.network, FILE)")
