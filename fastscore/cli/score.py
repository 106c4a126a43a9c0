"""fastscore score."""

import argparse
import glob
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from fastscore.cli import options, processes
from fastscore.cli.argument_types import positive
from fastscore.cli.parsers import Commands, add_command, add_json
from fastscore.cli.written import check_out, wrote
from fastscore.scoring.options import Checkpoint
from fastscore.scoring.weights import WEIGHT_IMPORTANCES


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "score", run, "MODEL --images FOLDER --out FILE ",
        "score every channel of a model on unlabelled images",
        "Score every channel of a model on a folder of unlabelled images.",
        "fastscore score torchvision:mobilenet_v2 --weights DEFAULT --images photos --out scores.safetensors\n"
        "fastscore score nets.py:build --checkpoint net.safetensors --images photos --size 64 --plot scores.png\n"
        "fastscore score torchvision:resnet50 --checkpoint resnet.pth --images photos --samples auto --json\n"
        "fastscore score torchvision:resnet50 --checkpoint resnet.pth --images photos --resume run.ckpt --out s\n"
        "torchrun --nproc-per-node 4 -m fastscore score torchvision:resnet50 --checkpoint resnet.pth --images photos "
        "--out s")
    options.add_model(command)
    options.add_scoring(command)
    long = command.add_argument_group("long runs")
    long.add_argument("--resume", metavar="FILE", help="keep the run in FILE; the same command goes on from there, "
                      "after whatever stopped it, to the same scores")
    long.add_argument("--fixed-order", action="store_true",
                      help="the same bits, whatever the number of processes (64 at most)")
    long.add_argument("--timeout", type=positive, default=30, metavar="MINUTES",
                      help="how long one process waits for another (default: %(default)s)")
    command.add_argument("--out", metavar="FILE", help="write the scores: a safetensors file, for prune --scores")
    command.add_argument("--plot", metavar="PNG", help="draw each layer's scores")
    add_json(command, "the scores")


def run(arguments: argparse.Namespace) -> None:
    """Score, print, write; of several processes, the first prints and writes."""
    check_out(arguments)
    prepare = options.preprocessing(arguments)
    rank, _ = processes.rank_and_world_size()
    with processes.group(options.device(arguments), timedelta(minutes=arguments.timeout)) as group, \
            _kept(arguments) as checkpoint:
        scores = options.scored(options.model(arguments, prepare), arguments, prepare, resume=checkpoint,
                                process_group=group, fixed_order=arguments.fixed_order)
    if rank > 0:
        return
    print(json.dumps({"origin": asdict(scores.origin), "samples": scores.samples, "skipped": dict(scores.skipped),
                      "scores": {layer: values.tolist() for layer, values in scores.items()}})
          if arguments.json else scores)
    if arguments.out is not None:
        scores.save(arguments.out)
    elif not (arguments.json or arguments.plot or arguments.resume):
        options.tell("nothing is kept of these scores; --out FILE keeps them, for prune --scores and report")
    if arguments.plot is not None:
        scores.plot(arguments.plot)
    kept = arguments.resume is not None and Path(arguments.resume).is_file()  # of several processes each has its own
    wrote(arguments.out, arguments.plot, arguments.resume if kept else None)


@contextmanager
def _kept(arguments: argparse.Namespace) -> Iterator[Checkpoint | None]:
    """Where the run is kept; a run that is not, is kept when it is stopped. Says how to go on from there."""
    if arguments.importance in WEIGHT_IMPORTANCES:
        yield None if arguments.resume is None else Checkpoint(arguments.resume)
        return
    stem = arguments.out or "fastscore"
    free = next(name for number in itertools.count(1)
                if not Path(name := f"{stem}{f'-{number}' if number > 1 else ''}.ckpt").exists())
    checkpoint = Checkpoint(free, only_when_stopped=True) if arguments.resume is None else \
        Checkpoint(arguments.resume, tell=options.tell)

    def written() -> dict[Path, int]:  # one file, or one for each process
        place = Path(checkpoint.path)
        return {path: path.stat().st_mtime_ns for path in place.parent.glob(f"{glob.escape(place.name)}*")}

    before = written()
    try:
        yield checkpoint
    except BaseException:
        if written() != before:
            again = "the same command" + (f" with --resume {checkpoint.path}" if arguments.resume is None else "")
            print(f"fastscore: what was scored is kept in {checkpoint.path}; {again} goes on from there",
                  file=sys.stderr)
        raise
