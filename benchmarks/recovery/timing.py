"""What repairing costs, in forward passes over the same images: MobileNetV2 at 224 x 224.

    python -m benchmarks.recovery.timing --data DATA --threads 2

Times prune() alone, and with calibration=512 images for each way of repairing, against forward passes of the dense
network over these images, taken in turns; writes OUT/timing.txt. Wall time, and the processor time of this process,
which other processes disturb less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastscore
from benchmarks import machine
from benchmarks.recovery.networks import NETWORKS

REPAIRS = ("mean", "linear", "asymmetric", "auto")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(function: Callable[[], Any]) -> dict[str, float]:
    """Clock -> of one call."""
    before = {name: clock() for name, clock in CLOCKS.items()}
    function()
    return {name: clock() - before[name] for name, clock in CLOCKS.items()}


def lines(data: Path, images: int, repeats: int, budget: float, repairs: Sequence[str]) -> list[str]:
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
                                                      repair=repair) for repair in repairs}}
    forward()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
    for _ in range(repeats):  # in turns: a machine is not equally fast all the time
        for name, function in timed.items():
            found[name].append(seconds(function))
            print(name, found[name][-1], flush=True)
    result = [f"MobileNetV2, {images} images of 224 x 224 in batches of 32, {budget} of the MACs; medians of {repeats}"]
    for clock in CLOCKS:
        medians = {name: statistics.median(row[clock] for row in rows) for name, rows in found.items()}
        base, alone = medians["forward pass over the images"], medians["prune()"]
        for name, value in medians.items():
            row = [times[clock] for times in found[name]]
            beyond = f"; beyond prune(): {(value - alone) / base:.2f} forward passes" if "calibration" in name else ""
            result.append(f"{clock:<9} {name:<40} {value:8.2f} s ({min(row):.2f} to {max(row):.2f}){beyond}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.timing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = f"load {os.getloadavg()[0]:.1f} before, "
    text = lines(options.data, options.images, options.repeats, options.budget, options.repairs)
    text.append(f"{load}{machine.describe('cpu')}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "timing.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
