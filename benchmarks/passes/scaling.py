"""`python -m benchmarks.passes.scaling`: bytes that processes exchange, and time against their number for a billion
samples.

The bytes are those of real scores. The time is simulated, from what is written in ASSUMED, with random numbers of a
fixed seed: nothing here has run on a cluster. What is simulated is what fastscore does: batches are dealt out in turn,
a process does its own one after another, and all add up once, at the end.
"""

import argparse
import csv
import heapq
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision

import fastscore

MODELS = ("mobilenet_v2", "resnet18", "resnet50", "densenet121")
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Cluster:
    """rate: samples a second of one process. spread: relative standard deviation of the speeds of processes, jitter:
    of a batch's time within one. start: seconds until the first batch, tracing and loading. bandwidth: bytes a second
    between two processes, latency: seconds for a message. lifetime: mean hours until a process dies. restart: seconds
    from a death until all go on from their checkpoints.
    """

    rate: float = 1000.0
    spread: float = 0.01
    jitter: float = 0.1
    start: float = 60.0
    bandwidth: float = 1e9
    latency: float = 1e-4
    lifetime: float = 2000.0
    restart: float = 120.0


ASSUMED = Cluster()
SAVING = 1 / 50  # of the time, at most


def exchanged(scores: fastscore.Scores) -> int:
    """Bytes that a process hands to all_reduce: two halves of the totals and the means, in float64, and five counts."""
    halves = 2 * sum(total.numel() for total in scores.half_totals.values())
    return 8 * (halves + sum(mean.numel() for mean in scores.means.values()) + 5)


def reduction(size: int, workers: int, cluster: Cluster) -> float:
    """Seconds of a ring all-reduce of `size` bytes: each process sends 2 (n - 1) / n of them, in 2 (n - 1) messages."""
    steps = 2 * (workers - 1)
    return steps * (size / workers / cluster.bandwidth + cluster.latency)


def exact(workers: int, batches: int, batch: int, cluster: Cluster, seed: int = 0) -> float:
    """Seconds until the last process has done its share, every batch drawn: for few batches, to test `drawn` with."""
    chance = random.Random(seed)
    speeds = [max(0.1, chance.gauss(1, cluster.spread)) for _ in range(workers)]
    ends = [cluster.start] * workers
    for number in range(batches):
        worker = number % workers
        ends[worker] += batch / cluster.rate / speeds[worker] * max(0.0, chance.gauss(1, cluster.jitter))
    return max(ends)


def drawn(workers: int, batches: int, batch: int, cluster: Cluster, seed: int = 0) -> float:
    """The same with each process's share drawn at once: k batches take k times one, and √k times its jitter."""
    chance = random.Random(seed)
    ends = []
    for worker in range(workers):
        share = len(range(worker, batches, workers))
        speed = max(0.1, chance.gauss(1, cluster.spread))
        ends.append(batch / cluster.rate / speed * (share + math.sqrt(share) * cluster.jitter * chance.gauss(0, 1)))
    return cluster.start + max(ends)


def taken_when_free(workers: int, batches: int, batch: int, cluster: Cluster, seed: int = 0) -> float:
    """What a queue would make of it, from which the first process that is free takes a batch: hardly less can be."""
    chance = random.Random(seed)
    speeds = [max(0.1, chance.gauss(1, cluster.spread)) for _ in range(workers)]
    free = [(cluster.start, worker) for worker in range(workers)]
    heapq.heapify(free)
    for _ in range(batches):
        at, worker = heapq.heappop(free)
        took = batch / cluster.rate / speeds[worker] * max(0.0, chance.gauss(1, cluster.jitter))
        heapq.heappush(free, (at + took, worker))
    return max(at for at, _ in free)


def row(workers: int, samples: int, batch: int, size: int, cluster: Cluster) -> dict[str, float]:
    """Hours for `samples`, parts of them, and the share of the processes' time that went into scoring."""
    batches = math.ceil(samples / batch)
    scoring = drawn(workers, batches, batch, cluster) * (1 + SAVING)
    adding = reduction(size, workers, cluster)
    deaths = scoring / 3600 * workers / cluster.lifetime
    total = scoring + adding + deaths * cluster.restart
    return {"workers": workers, "hours": total / 3600, "seconds adding up": adding, "deaths": deaths,
            "efficiency": samples / cluster.rate / workers / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--batch-size", type=int, default=32)
    for name, value in vars(ASSUMED).items():
        parser.add_argument(f"--{name}", type=float, default=value, help="default: %(default)s")
    arguments = parser.parse_args()
    cluster = replace(ASSUMED, **{name: getattr(arguments, name) for name in vars(ASSUMED)})
    RESULTS.mkdir(exist_ok=True)
    print(f"{'':14} {'channels':>9} {'bytes':>10} {'fixed order':>12}")
    sizes = {}
    for name in MODELS:
        model = torchvision.models.get_model(name, weights=None)
        scores = fastscore.score(model, [torch.randn(2, 3, 64, 64)], progress=False)
        sizes[name] = exchanged(scores)
        print(f"{name:14} {sum(map(len, scores.values())):>9,} {sizes[name]:>10,} {64 * sizes[name]:>12,}")
    rows = [row(workers, int(arguments.samples), arguments.batch_size, sizes["resnet50"], cluster)
            for workers in WORKERS]
    print(f"\n{arguments.samples:,.0f} samples in batches of {arguments.batch_size}, {cluster}")
    print("".join(f"{name:>19}" for name in rows[0]))
    for each in rows:
        print("".join(f"{value:>19,.4g}" if isinstance(value, float) else f"{value:>19,}" for value in each.values()))
    with (RESULTS / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
