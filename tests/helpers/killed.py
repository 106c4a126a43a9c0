"""A run that is killed over and over: python -m killed FOLDER KILLS SEED JOB, with tests/helpers on the path.

JOB is "score" or "reconstruct".

Prints JSON: how many batches the run's file held after each kill and in the end, and whether the run ended as one that
nobody killed. Each start is a fork of this process, which has imported torch but run nothing in parallel.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import NETWORKS
from torch import Tensor

import fastscore
from fastscore import files
from fastscore.batches.calls import Forward
from fastscore.graph.tracing import trace
from fastscore.recovery import kept
from fastscore.scoring import run_file, runs

SECONDS = 0.005  # of each call of the model
LENGTH = {"score": 8, "reconstruct": 5}[sys.argv[4]] * int(sys.argv[2])  # batches of the run
NETWORK = NETWORKS["residual"]
MODEL = NETWORK.model().float()


def batches(count: int) -> list[Tensor]:
    """Float32 images, uneven in number."""
    return list(NETWORK.inputs(2 * count + 1).float().split([3, *[2] * (count - 1)]))


@functools.cache
def slowly(folder: Path) -> Forward:
    """Calls a model after a while; folder/log gets a byte for each call."""
    def forward(model: torch.nn.Module, batch: Tensor) -> Tensor:
        with (folder / "log").open("ab") as file:
            file.write(b".")
        time.sleep(SECONDS)
        output: Tensor = model(batch)
        return output

    return forward


def score(folder: Path, checkpoint: Path | None) -> None:
    """Score slowly, and write the scores."""
    scores = fastscore.score(MODEL, iter(batches(LENGTH)), probes=2, resume=checkpoint, forward=slowly(folder),
                             progress=False)
    scores.save(folder / ("resumed" if checkpoint else "whole"))


@functools.cache
def pruned() -> fastscore.PruneResult:
    """What is repaired."""
    scores = fastscore.score(MODEL, batches(3), importance="magnitude-l2", progress=False)
    return fastscore.prune(MODEL, scores, batches(1)[0], channels=0.6)


def reconstruct(folder: Path, checkpoint: Path | None) -> None:
    """Repair a pruned network slowly, and write its weights and what was tried."""
    found = fastscore.reconstruct(MODEL, pruned(), batches(LENGTH), "linear", ridges=(0.01,), forward=slowly(folder),
                                  resume=checkpoint)
    torch.save({"weights": found.model.state_dict(), "tried": [vars(row) for row in found.report.repairs]},
               folder / ("resumed" if checkpoint else "whole"))


def die_while_writing(moment: str) -> None:
    """From now on the process kills itself before the new file is written, in the middle, or before it is moved."""
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    original = open

    class Half:
        def __init__(self, path: str) -> None:
            self.file = original(path, "wb")

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, contents: bytes) -> None:
            self.file.write(contents[:len(contents) // 2])
            self.file.flush()
            die()

    if moment == "before":
        files.open = die  # type: ignore[attr-defined]
    elif moment == "half":
        files.open = lambda path, mode: Half(path)  # type: ignore[attr-defined]
    else:
        os.replace = die


def fork(function: object, *arguments: object) -> int:
    """The id of a child that calls `function` and ends."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)  # type: ignore[operator]
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def start(job: str, folder: Path, moment: str | None) -> None:
    """A start of the run that is to be killed."""
    if moment is not None:
        die_while_writing(moment)
    JOBS[job](folder, folder / "s.ckpt")


def done(job: str, folder: Path) -> int:
    """Batches in the checkpoint."""
    path = folder / "s.ckpt"
    if not path.exists():
        return 0
    if job == "score":
        return int(files.read_state(path, runs.FORM, "checkpoint", "")["done"])
    return sum(each["done"] for each in files.read_state(path, kept.FORM, "checkpoint", "")["passes"].values())


def calls(folder: Path) -> int:
    """How often the model has been called."""
    return (folder / "log").stat().st_size if (folder / "log").exists() else 0


def same(job: str, folder: Path) -> bool:
    """Whether both runs ended with the same, bit for bit."""
    if job == "reconstruct":
        whole, resumed = (torch.load(folder / name) for name in ("whole", "resumed"))
        weights = zip(whole["weights"].items(), resumed["weights"].items(), strict=True)
        return whole["tried"] == resumed["tried"] and all(
            name == other and torch.equal(value, again) for (name, value), (other, again) in weights)
    whole, resumed = (fastscore.Scores.load(folder / name) for name in ("whole", "resumed"))
    facts = [(s.origin, s.passes, s.half_passes, s.samples, s.zero_gradients) for s in (whole, resumed)]
    pairs = [(getattr(whole, kind), getattr(resumed, kind)) for kind in ("totals", "means", "half_totals")]
    return facts[0] == facts[1] and all(ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key])
                                                                            for key in ours) for ours, theirs in pairs)


JOBS: dict[str, Callable[[Path, Path | None], None]] = {"score": score, "reconstruct": reconstruct}
REACH = 40  # calls of the model in one start, at most


def main(folder: Path, kills: int, seed: int, job: str) -> None:
    torch.set_num_threads(1)
    run_file.SHARE = 0.5  # saved after nearly every batch, so that many a kill comes in the middle of it
    chance = random.Random(seed)
    trace(MODEL, batches(1)[0], slowly(folder))  # once for all starts, like what is repaired
    if job == "reconstruct":
        pruned()
    assert os.waitpid(fork(JOBS[job], folder, None), 0)[1] == 0
    moments = [None] * (kills - 6) + ["before", "half", "after"] * 2
    chance.shuffle(moments)
    stood_at: list[int] = []
    while len(stood_at) < kills:
        moment, seen = moments[len(stood_at)], calls(folder)
        child, ended = fork(start, job, folder, moment), (0, 0)
        if moment is None:
            until = seen + chance.randrange(REACH)
            while calls(folder) < until and ended[0] == 0:
                time.sleep(0.001)
                ended = os.waitpid(child, os.WNOHANG)
            time.sleep(chance.uniform(0, 2 * SECONDS))
            if ended[0] == 0:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0) if ended[0] == 0 else ended
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            stood_at.append(done(job, folder))
        else:  # it was too quick: from the start again
            assert status == 0
            (folder / "s.ckpt").unlink()
    assert os.waitpid(fork(start, job, folder, None), 0)[1] == 0
    print(json.dumps({"stood at": stood_at, "ended at": done(job, folder), "same": same(job, folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
