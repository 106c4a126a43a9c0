"""`python -m benchmarks.passes.profile_pass --out DIR`: what one pass over a model consists of.

A table of operations (profile.txt) and a trace for chrome://tracing or perfetto.dev (profile.json.gz), of a batch after
three others of its shape: on a GPU, a replayed graph. --no-graph: pass by pass as it is.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastscore
from benchmarks import machine
from benchmarks.peers.task import Task


def main() -> None:
    """Run, print where the files are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes.profile_pass", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    machine.add_arguments(parser)
    arguments = parser.parse_args()
    machine.settle(arguments)
    task = Task.random(arguments.model, arguments.batch, arguments.size, arguments.device, arguments.layout)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (arguments.device == "cuda")
    recorded = profile(activities=activities)

    def batches() -> Iterator[Tensor]:
        for _ in range(4):
            yield task.images
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        with recorded:
            yield task.images
            if arguments.device == "cuda":
                torch.cuda.synchronize()

    scores = fastscore.score(task.model, batches(), progress=False, graph=False if arguments.no_graph else "auto")
    arguments.out.mkdir(parents=True, exist_ok=True)
    by = "self_cuda_time_total" if arguments.device == "cuda" else "self_cpu_time_total"
    table = f"{machine.describe(arguments.device)}\n{scores.plan!r} {scores.plan.graph if scores.plan else ''}\n" \
            f"{recorded.key_averages().table(sort_by=by, row_limit=60)}"
    (arguments.out / "profile.txt").write_text(table)
    recorded.export_chrome_trace(str(arguments.out / "profile.json.gz"))
    print("\n".join(table.splitlines()[:40]))
    print(f"wrote {arguments.out / 'profile.txt'} and {arguments.out / 'profile.json.gz'}")


if __name__ == "__main__":
    main()
