"""fastscore beside what people use today, on the same models, images, channel groups and machine.

    python -m benchmarks.peers --out benchmarks/results/peers-cpu
    for model in resnet18 resnet50; do python -m benchmarks.peers --models $model --parts pass whole --out FILE; done

The second comes to the same table, model by model: tables that FILE has from the same machine, versions and settings
stay, but for those that are measured again. --growth --out FILE adds how the cost of a pass grows.

Four parts, a table for each model. pass: one batch is scored; graphs are traced beforehand. per-sample: the same for
scores of each sample, against Torch-Pruning's Hessian, which takes a backward pass for each, where taylor-sq takes one
for the batch. whole: from images to a network of half the MACs, tracing included. prune: the surgery alone.

Contestants run in turn within each round; seconds are medians, "times as fast" compares with the first of the table
within each round, with the least and the most; for pass, that is Torch-Pruning's Taylor (forward, backward and its
call). Memory is the peak of live tensor bytes, above those before the run; a run of fastscore is a whole call of
score(). Models have random weights; all are in evaluation mode.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.peers import chart, growth
from benchmarks.peers.contestants import CONTESTANTS, PER_SAMPLE
from benchmarks.peers.measure import Row, compare
from benchmarks.peers.task import Task
from benchmarks.peers.whole import PARTS, Job

MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "vit_b_16")
PASSES = {"pass": tuple(CONTESTANTS), "per-sample": PER_SAMPLE}  # the baseline first
DEFAULTS = {"pass": (MODELS, 8), "per-sample": (("resnet18",), 16), "whole": (MODELS, 8),
            "prune": (("densenet121",), 8)}  # part -> (models, images at a time)


def passes(part: str, name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant: one batch scored."""
    torch.compiler.reset()  # it compiles one piece of code for eight models at most
    batch = arguments.batch or DEFAULTS[part][1]
    task = Task.random(name, batch, arguments.size, arguments.device, arguments.layout)
    baseline, *others = PASSES[part]
    chosen = {contestant: partial(CONTESTANTS[contestant], task) for contestant in (baseline, *others)
              if contestant == baseline or (any(contestant.startswith(start) for start in arguments.contestants)
                                            and not any(word in contestant for word in arguments.without))}
    for contestant, figures in compare(chosen, baseline, arguments.repeats, arguments.device).items():
        yield Row(part, name, contestant, batch, arguments.size, **figures)


def whole(part: str, name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant of a part of benchmarks.peers.whole, with the MACs that remain."""
    job = Job(Task.random(name, arguments.images, arguments.size, arguments.device, arguments.layout),
              arguments.batch or DEFAULTS[part][1])
    chosen = {contestant: partial(prepare, job) for contestant, prepare in PARTS[part].items()}
    found = compare(chosen, next(iter(chosen)), arguments.repeats, arguments.device,
                    lambda model: f"{job.share(model):.3f} of the MACs remain")
    for contestant, figures in found.items():
        yield Row(part, name, contestant, arguments.images, arguments.size, **figures)


def line(row: Row) -> str:
    """A row of the table that is printed."""
    if row.seconds is None:
        return f"{row.model:<13}{row.contestant:<34}{row.note}"
    ratios = "" if row.times_as_fast is None else f"{row.times_as_fast:.2f} ({row.least:.2f} to {row.most:.2f})"
    return (f"{row.model:<13}{row.contestant:<34}{row.per_100_images:>9.2f}{row.peak_mib:>10.0f}"
            f"   {ratios:<22}{row.note}").rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print each table as it comes, and write it and its chart where --out says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="of torchvision (default: "
                        + "; ".join(f"{part}: {' '.join(models)}" for part, (models, _) in DEFAULTS.items()) + ")")
    parser.add_argument("--contestants", nargs="+", default=[""],
                        help="of pass and per-sample: those whose names begin so (default: all)")
    parser.add_argument("--without", nargs="+", default=[], help="those whose names hold such a word: compiled, say")
    parser.add_argument("--parts", nargs="+", default=list(DEFAULTS), choices=tuple(DEFAULTS))
    parser.add_argument("--growth", action="store_true", help="how a pass's cost grows, instead of the comparison")
    parser.add_argument("--batch", type=int, help="images at a time (default: "
                        + "; ".join(f"{part}: {batch}" for part, (_, batch) in DEFAULTS.items()) + ")")
    parser.add_argument("--images", type=int, default=64, help="images of a whole call (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image (default: 224)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="write this path with .csv, and .png and -growth.png for the charts")
    machine.add_arguments(parser)
    arguments = parser.parse_args(argv)
    machine.settle(arguments)
    kept = chart.File(arguments.out.with_suffix(".csv"), machine.facts(arguments.device)) if arguments.out else None
    print(machine.describe(arguments.device), flush=True)
    make = partial(Task.random, device=arguments.device, layout=arguments.layout)
    tables = growth.tables(make, arguments.repeats, arguments.device) if arguments.growth else \
        ((part, passes(part, name, arguments) if part in PASSES else whole(part, name, arguments))
         for part in arguments.parts for name in arguments.models or DEFAULTS[part][0])
    last = ""
    for title, table in tables:
        if title != last:
            print(f"\n{title:<47}{'s/100 im.':>9}{'peak MiB':>10}   times as fast", flush=True)
        last = title
        rows = []
        for row in table:
            rows.append(row)
            print(line(row), flush=True)
        if kept is not None:  # table by table: the next may take an hour
            kept.add(rows)
    if kept is not None:
        chart.draw(kept.rows, kept.facts, kept.path)


if __name__ == "__main__":
    main()
