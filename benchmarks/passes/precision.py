"""`python -m benchmarks.passes.precision --data ROOT`: what a pass in bfloat16 does to the ranking of channels.

Scores in bfloat16 beside those in float32 on the same images with the same random gradients, on trained networks: a
MobileNetV2 with weights from ImageNet, and those of the paper's experiment. As a yardstick for what the rounding
matters: scores in float32 with other random gradients (another seed) on the same images.

rank: Spearman's correlation over all channels. 10 %, 30 %, 50 %: the share of the channels that one would prune at
this fraction which the other would prune too. ROOT holds Fashion-MNIST as torchvision lays it out; MobileNetV2 takes
the images of benchmarks.paper.mobilenet. Writes benchmarks/results/precision.csv.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fastscore
from benchmarks import machine
from benchmarks.paper import mobilenet
from benchmarks.paper.agreement import flat, overlap, spearman
from benchmarks.paper.data import load
from benchmarks.paper.networks import NETWORKS
from fastscore import Scores

RESULTS = Path(__file__).parents[1] / "results"
FRACTIONS = (0.1, 0.3, 0.5)
IMPORTANCES = ("taylor-sq", "taylor-abs")
COLUMNS = ("model", "images", "importance", "compared", "rank", *(f"{fraction:.0%}" for fraction in FRACTIONS))


def agreement(one: Scores, other: Scores) -> dict[str, float]:
    """Rank correlation, and the overlap of the pruned sets at each of FRACTIONS."""
    values = [flat(scores) for scores in (one, other)]
    return {"rank": spearman(*values), **{f"{fraction:.0%}": overlap(*values, fraction) for fraction in FRACTIONS}}


def compare(model: nn.Module, images: Tensor, batch: int, importance: str) -> Iterator[dict[str, float | str]]:
    """A row for each of bfloat16 and another seed, against float32."""
    def score(**how: object) -> Scores:
        return fastscore.score(model, images.split(batch), importance=importance, progress=False, **how)

    exact = score()
    for compared, how in (("bfloat16", {"precision": "bfloat16"}), ("another seed", {"seed": 1})):
        yield {"importance": importance, "compared": compared, **agreement(exact, score(**how))}


def networks(data: str, images: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, trained network, images [N, C, H, W])"""
    yield "mobilenet_v2", mobilenet.load(), mobilenet.imagenet_views()[:images]
    test = load("fashion-mnist", data).test.images[:images]
    for path in sorted((RESULTS / "paper" / "networks").glob("*.pt")):
        kind = path.stem.removeprefix("fashion-mnist-").split("-")[0]
        model = NETWORKS[kind](1, 10)
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        yield path.stem, model.eval(), test


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes.precision", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder with Fashion-MNIST")
    parser.add_argument("--images", type=int, default=256, help="of each network, at most (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.csv")
    arguments = parser.parse_args(argv)
    print(f"{machine.describe('cpu')}\n\n{'':<46}{'images':>7}{'rank':>9}"
          + "".join(f"{f'{fraction:.0%}':>8}" for fraction in FRACTIONS))
    rows: list[dict[str, float | str | int]] = []
    for name, model, images in networks(arguments.data, arguments.images):
        for importance in IMPORTANCES:
            for row in compare(model, images, arguments.batch, importance):
                rows.append({"model": name, "images": len(images), **row})
                label = f"{name.removeprefix('fashion-mnist-')}, {importance}, {row['compared']}"
                print(f"{label:<46}{len(images):>7}{row['rank']:>9.4f}"
                      + "".join(f"{row[f'{fraction:.0%}']:>8.3f}" for fraction in FRACTIONS), flush=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


if __name__ == "__main__":
    main()
