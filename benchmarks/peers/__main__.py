"""fastscore beside what people use today, on the same models, images, channel groups and machine.

    python -m benchmarks.peers [--models resnet18 ...] [--out benchmarks/results/peers-cpu]
    python -m benchmarks.peers --models resnet18 --batch 16 --parts pass --contestants Torch-Pruning fastscore

The second compares scores of each sample: Torch-Pruning's Hessian takes a backward pass for each, and that of taylor-sq
one for the batch.

Three tables for each model. pass: one batch is scored; graphs are traced beforehand. whole: from images to a network of
half the MACs, tracing included. prune: the surgery alone, on densenet121 unless told otherwise. With --growth: how the
cost of a pass grows, instead.

Contestants run in turn within each round; seconds are medians, "times as fast" compares with Torch-Pruning's Taylor
(forward, backward and its call) within each round, with the least and the most. Memory is the peak of live tensor
bytes, above those before the run. Models have random weights; all are in evaluation mode.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import machine
from benchmarks.peers import chart, growth
from benchmarks.peers.contestants import BASELINE, CONTESTANTS
from benchmarks.peers.measure import Row, compare
from benchmarks.peers.task import Task
from benchmarks.peers.whole import PARTS, Job

MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "vit_b_16")


def passes(name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant: one batch scored."""
    task = Task.random(name, arguments.batch, arguments.size, arguments.device, arguments.layout)
    chosen = {contestant: partial(prepare, task) for contestant, prepare in CONTESTANTS.items()
              if contestant == BASELINE or any(contestant.startswith(start) for start in arguments.contestants)}
    for contestant, figures in compare(chosen, BASELINE, arguments.repeats, arguments.device).items():
        yield Row("pass", name, contestant, arguments.batch, arguments.size, **figures)


def whole(part: str, name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each contestant of a part of benchmarks.peers.whole, with the MACs that remain."""
    job = Job(Task.random(name, arguments.images, arguments.size, arguments.device, arguments.layout), arguments.batch)
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
    parser.add_argument("--models", nargs="+", default=MODELS, help="of torchvision (default: six)")
    parser.add_argument("--contestants", nargs="+", default=[""], help="those whose names begin so (default: all)")
    parser.add_argument("--parts", nargs="+", default=["pass", *PARTS], choices=("pass", *PARTS))
    parser.add_argument("--surgery-models", nargs="+", default=["densenet121"], help="of the part prune")
    parser.add_argument("--growth", action="store_true", help="how a pass's cost grows, instead of the comparison")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: 8)")
    parser.add_argument("--images", type=int, default=64, help="images of a whole call (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image (default: 224)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="write this path with .csv, and with .png for the chart of passes")
    machine.add_arguments(parser)
    arguments = parser.parse_args(argv)
    machine.settle(arguments)
    print(machine.describe(arguments.device), flush=True)
    rows: list[Row] = []
    make = partial(Task.random, device=arguments.device, layout=arguments.layout)
    tables = growth.tables(make, arguments.repeats, arguments.device) if arguments.growth else \
        ((part, passes(name, arguments) if part == "pass" else whole(part, name, arguments))
         for part in arguments.parts for name in (arguments.surgery_models if part == "prune" else arguments.models))
    last = ""
    for title, table in tables:
        if title != last:
            print(f"\n{title:<47}{'s/100 im.':>9}{'peak MiB':>10}   times as fast", flush=True)
        last = title
        for row in table:
            rows.append(row)
            print(line(row), flush=True)
        if arguments.out:  # table by table: the next may take an hour
            chart.write_csv(rows, machine.facts(arguments.device), arguments.out.with_suffix(".csv"))
    if arguments.out and any(row.part == "pass" for row in rows):
        chart.draw(rows, machine.facts(arguments.device), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
