"""Processes that share work: python -m workers FOLDER SIZE JOB..., with tests/helpers on the path.

Each is a fork of this one, which has imported torch already and run nothing in parallel, and has its place in the
environment, as a launcher would give it; but there is none to end the others when one dies. What a process prints goes
into FOLDER/out RANK and FOLDER/err RANK. Prints their exit codes, in the order of ranks; negative ones are signals.
"""

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import distilling
import torch
from networks import NETWORKS
from thinned import thinned
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastscore
from fastscore.cli import main as cli
from fastscore.cli.processes import ProcessLostError, group
from fastscore.graph.tracing import trace

RESIDUAL = NETWORKS["residual"]
IMAGES = RESIDUAL.inputs(11)
WORKERS = 4
# what a job imports, in seconds, besides: optimizers torch._dynamo, and images torchvision
SLOW = {"work": ("torch.distributed.fsdp", "torch._dynamo"), "distill": ("torch._dynamo",),
        "fastscore": ("torchvision",)}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "orthogonal": {"probes": 2, "distribution": "orthogonal"}, "to the mean": {"ablation": "mean"},
    "taylor": {"importance": "taylor"}, "minibatches": {"importance": "molchanov-group"}}
FOUND = thinned(WAYS, (False, True))  # and in a fixed order, or not


def drop_in(model: nn.Module, x: Tensor, graph: Any = None, **options: Any) -> fastscore.Scorer:
    """A scorer that has read a loop of plain backward passes, two samples at a time."""
    scorer = fastscore.Scorer(model, IMAGES if graph is None else graph, **options)
    with scorer:
        for batch in x.split(2):
            model(batch).square().sum().backward()
    return scorer


def made_smaller(model: nn.Module) -> dict[str, Any]:
    """What a model, in DistributedDataParallel or not, becomes by prune(), mask() and prune_iteratively(), the last
    with steps of training in between, which processes take together."""
    wrapped = isinstance(model, DistributedDataParallel)

    def train(smaller: nn.Module) -> None:
        smaller.train()
        parallel = DistributedDataParallel(smaller) if wrapped else smaller
        optimizer = torch.optim.SGD(smaller.parameters(), lr=1e-3)
        (parallel(IMAGES[:4]).square().mean()).backward()
        optimizer.step()
        smaller.eval()

    scores = fastscore.score(model, IMAGES.split(3), progress=False)
    pruned = fastscore.prune(model, scores, IMAGES[:1], macs=0.6)
    with torch.no_grad(), fastscore.mask(model, scores, 0.3, IMAGES[:1]) as removed:
        masked = model(IMAGES[:4])
    in_steps = fastscore.prune_iteratively(model, [IMAGES], steps=2, channels=0.6, finetune=train, progress=False)
    model.zero_grad()
    fastscore.random_backward(model(IMAGES[:3]), IMAGES[:3], seed=3)
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {name: parameter.grad for name, parameter in inside.named_parameters()}
    return {"scores": dict(scores.totals), "pruned": pruned.model.state_dict(), "removed": dict(removed),
            "masked": {"": masked}, "in steps": in_steps.model.state_dict(), "gradients": gradients}


def work(rank: int, folder: str) -> None:
    """Everything that needs four processes, so that they start but once; the results go into files."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=600))

    def save(scores: fastscore.Scores, name: str) -> None:
        scores.save(f"{folder}/{name} {rank}")

    def expect(error: type[Exception], name: str, function: Any, *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except error as found:
            Path(f"{folder}/{name} {rank}").write_text(str(found))

    for size in (1, 2, 4):
        some = distributed.new_group(list(range(size)))
        if rank < size:
            for way, fixed in FOUND:
                save(fastscore.score(RESIDUAL.traced(), IMAGES.split(3), process_group=some, fixed_order=fixed,
                                     progress=False, **WAYS[way]), f"{way} {size} {fixed}")
            checkpoint = f"{folder}/{size}.ckpt"
            save(fastscore.score(RESIDUAL.traced(), IMAGES.split(3)[:3], process_group=some, fixed_order=True,
                                 progress=False, resume=checkpoint), f"three batches {size}")
            save(fastscore.score(RESIDUAL.traced(), IMAGES.split(3), process_group=some, fixed_order=True,
                                 progress=False, resume=checkpoint), f"gone on {size}")
    everyone = distributed.group.WORLD
    expect(ValueError, "another seed", fastscore.score, RESIDUAL.traced(), IMAGES.split(3), process_group=everyone,
           seed=int(rank == 2), progress=False)
    expect(ValueError, "other weights", fastscore.score, RESIDUAL.model(int(rank == 1)), IMAGES.split(3),
           process_group=everyone, progress=False)

    scorer = fastscore.Scorer(RESIDUAL.traced(), IMAGES, gradient="random", seed=3)
    model = scorer._taps.model
    with scorer:
        for batch in IMAGES[rank:9:WORKERS].split(2) if rank != 3 else ():  # 3, 2, 2 and no samples
            scorer.probe(model(batch))
    scorer.all_reduce()
    save(scorer.scores(), "all_reduce")

    wrapped = DistributedDataParallel(RESIDUAL.model())
    scorer = drop_in(wrapped, IMAGES[rank:8:WORKERS])  # as many steps in each, which gradients in common ask for
    scorer.all_reduce()
    save(scorer.scores(), "DDP")
    save(fastscore.score(wrapped, IMAGES.split(3), process_group=everyone, progress=False), "DDP, score")

    torch.save(made_smaller(wrapped), f"{folder}/DDP, smaller {rank}")

    from torch.distributed.fsdp import fully_shard  # slow to import
    model = RESIDUAL.model()
    graph = trace(model, IMAGES[:1])
    for part in (model.block1, model.block2, model):
        fully_shard(part)
    expect(ValueError, "FSDP2, score", fastscore.score, model, IMAGES.split(3), progress=False)
    expect(ValueError, "FSDP2, Scorer", fastscore.Scorer, model, IMAGES)
    scorer = drop_in(model, IMAGES[rank:8:WORKERS], graph)
    scorer.all_reduce()
    save(scorer.scores(), "FSDP2")
    scorer = fastscore.Scorer(model, graph, gradient="random", seed=3)
    with scorer:
        output = model(IMAGES[rank:8:WORKERS])
        scorer.probe(output)
        scorer.probe(output)
        output.square().sum().backward()
    scorer.all_reduce()
    save(scorer.scores(), "FSDP2, probes")
    distributed.destroy_process_group()


def repair(rank: int, folder: str) -> None:
    """reconstruct() and recalibrate() by 1, 2 and 4 processes, of which the last has nothing to read."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    model, batches = RESIDUAL.traced(), RESIDUAL.inputs(24).split(8)
    scores = fastscore.score(model, batches, progress=False)
    for size in (1, 2, 4):
        some = distributed.new_group(list(range(size)))
        if rank < size:
            for method in ("linear", "asymmetric", "auto"):
                result = fastscore.prune(model, scores, batches[0][:1], channels=0.6, calibration=batches,
                                         repair=method, process_group=some)
                rows = [(row.name, row.ridge, row.agreement, row.kl, row.chosen) for row in result.report.repairs]
                torch.save((rows, result.model.state_dict()), f"{folder}/{method} {size} {rank}")
            if size == 2:
                bare = fastscore.prune(model, scores, batches[0][:1], channels=0.6)
                for name in ("kept", "gone on"):
                    found = fastscore.reconstruct(model, bare, batches, "linear", process_group=some,
                                                  resume=f"{folder}/moments")
                    torch.save(found.model.state_dict(), f"{folder}/{name} {rank}")
            torch.save(fastscore.recalibrate(RESIDUAL.model(), batches, process_group=some).state_dict(),
                       f"{folder}/recalibrated {size} {rank}")
            torch.save(fastscore.recalibrate(Sometimes(), RESIDUAL.inputs(20).split(8), process_group=some)
                       .state_dict(), f"{folder}/sometimes {size} {rank}")
    distributed.destroy_process_group()


class Sometimes(nn.Module):
    """A BatchNorm that small batches alone come by, beside one that all do."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.small = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if len(x) < 8 else self.always(x)


class Fastidious(nn.Module):
    """Takes no image that holds a 99 once it has lost half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if h.shape[1] < 5 and bool((x == 99).any()):
            raise RuntimeError("a 99")
        return self.head(self.second(h).relu().mean((2, 3)))


def fastidious(rank: int, folder: str) -> None:
    """A model that raises, in trials of widths, in one of two processes alone, whose batches it does not take."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model, images = Fastidious().double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.float64)
    images[8:16, 0, 0, 0] = 99
    batches = images.split(8)
    scores = fastscore.score(model, batches, progress=False)
    for size in (1, 2):
        some = distributed.new_group(list(range(size)), timeout=timedelta(seconds=60))
        if rank < size:
            result = fastscore.prune(model, scores, batches[0][:1], channels=0.75, calibration=batches,
                                     process_group=some, measured=True)
            torch.save({**result.removed}, f"{folder}/fastidious {size} {rank}")
            torch.save(result.model.state_dict(), f"{folder}/fastidious state {size} {rank}")
    distributed.destroy_process_group()


def silent(rank: int) -> int:
    """The second process does not answer, until the first has given up."""
    try:
        with group(torch.device("cpu"), timedelta(seconds=3)) as both:
            distributed.all_reduce(torch.ones(1), group=both)
            if rank == 1:
                while not Path("given up").exists():
                    time.sleep(0.05)
                return 0
            distributed.all_reduce(torch.ones(1), group=both)
    except ProcessLostError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        Path("given up").touch()
    return 0


def start(folder: Path, rank: int, function: Callable[[], int | None]) -> int:
    """The id of a child with a place of its own."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name} {rank}", os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        code = function() or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, size: int, job: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    for name in SLOW.get(job, ()):
        importlib.import_module(name)
    if job in ("work", "repair"):
        RESIDUAL.traced()
    jobs: dict[str, Callable[[int], int | None]] = {
        "work": lambda rank: work(rank, str(folder)), "repair": lambda rank: repair(rank, str(folder)),
        "fastidious": lambda rank: fastidious(rank, str(folder)),
        "distill": lambda rank: distilling.work(rank, str(folder)),
        "silent": silent, "fastscore": lambda rank: cli(arguments)}
    children = [start(folder, rank, lambda rank=rank: jobs[job](rank)) for rank in range(size)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
