"""What repairing costs, in forward passes over the same images: MobileNetV2 at 224 x 224.

    python -m benchmarks.recovery.timing --data DATA --threads 2

Times prune() alone, and with calibration=512 images for each way of repairing, against forward passes of the dense
network over these images; writes OUT/timing.txt.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastscore
from benchmarks import machine
from benchmarks.recovery.networks import NETWORKS

REPAIRS = ("mean", "linear", "auto")


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Of each call."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def lines(data: Path, images: int, repeats: int, budget: float) -> list[str]:
    """The report, a line each."""
    task = NETWORKS["mobilenet_v2"](data)
    batches = list(task.images.images[:images].split(32))
    example = batches[0][:1]
    scores = fastscore.score(task.model, batches[:2], ablation="mean", progress=False)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            task.model(batch)

    timed = {"forward pass over the images": forward,
             "prune()": lambda: fastscore.prune(task.model, scores, example, macs=budget),
             **{f"prune(calibration=, repair={repair!r})":
                lambda repair=repair: fastscore.prune(task.model, scores, example, macs=budget, calibration=batches,
                                                      repair=repair) for repair in REPAIRS}}
    forward()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):  # in turns: a machine is not equally fast all the time
        for name, function in timed.items():
            found[name] += seconds(function, 1)
    medians = {name: statistics.median(row) for name, row in found.items()}
    base, alone = medians["forward pass over the images"], medians["prune()"]
    result = [f"MobileNetV2, {images} images of 224 x 224 in batches of 32, {budget} of the MACs; medians of {repeats}"]
    for name, value in medians.items():
        beyond = "" if "calibration" not in name else f"; beyond prune(): {(value - alone) / base:.2f} forward passes"
        result.append(f"{name:<40} {value:8.2f} s ({min(found[name]):.2f} to {max(found[name]):.2f}){beyond}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.timing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = f"load {os.getloadavg()[0]:.1f} before, "
    text = lines(options.data, options.images, options.repeats, options.budget)
    text.append(f"{load}{machine.describe('cpu')}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "timing.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
