"""`python -m benchmarks.memory`: the most memory that a pass takes, each contestant in a process of its own.

RSS is the growth of the process's resident memory at its peak, as the kernel counts it (VmHWM, set back through
/proc/self/clear_refs just before); it depends on malloc. Tensors is the peak of live tensor bytes, which does not.
A pass of fastscore is the whole call, with its copy of the model. The code has been loaded, by a pass over a small
network; the model has not run before.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import machine
from benchmarks.peers.contestants import BASELINE, CONTESTANTS
from benchmarks.peers.measure import Stopwatch, peak_bytes
from benchmarks.peers.task import Prepare, Task

PLAIN = "forward and backward alone"
DEFAULT = (PLAIN, BASELINE, "plain hooks, frozen", "fastscore, random")


def resident(field: str) -> int:
    """Bytes of this process: VmRSS at this moment, VmHWM at most since the peak was set back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def growth(prepare: Prepare, task: Task) -> dict[str, int]:
    """Bytes: {"rss", "tensors"} of one pass; tensors alone on a GPU."""
    device = task.images.device.type
    load_code(prepare, device)
    gc.collect()
    found = {}
    if device == "cpu":
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        prepare(task)(Stopwatch())
        found["rss"] = resident("VmHWM") - before
    run = prepare(task)
    return {**found, "tensors": peak_bytes(lambda: run(Stopwatch(device)), device)}


def load_code(prepare: Prepare, device: str) -> None:
    """Run the contestant on a network of a few kilobytes, so that libraries and kernels are in memory."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval().to(device)
    small = Task.of(model, torch.randn(2, 3, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    prepare(small)(Stopwatch(device))


def in_own_process(contestant: str, model: str, arguments: argparse.Namespace) -> dict[str, int]:
    """`growth` of a fresh process with the same settings."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", contestant, "--models", model,
               *(f"--{name}={getattr(arguments, name)}"
                 for name in ("batch", "size", "device", "threads", "layout", "allocator"))]
    done = subprocess.run(command, env=machine.malloc_environment(arguments.allocator), capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{contestant} on {model} failed:\n{done.stderr}")
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=tuple(CONTESTANTS),
                        metavar="NAME", help=f"of: {'; '.join(CONTESTANTS)}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--child", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    machine.add_arguments(parser, allocator="default")
    arguments = parser.parse_args()
    machine.settle(arguments)
    if arguments.child:
        task = Task.random(arguments.models[0], arguments.batch, arguments.size, arguments.device, arguments.layout)
        print(json.dumps(growth(CONTESTANTS[arguments.child], task)))
        return
    kinds = ("RSS", "tensors") if arguments.device == "cpu" else ("tensors",)
    head = "".join(kind.rjust(8) + 7 * " " for kind in kinds).rstrip()
    print(f"{machine.describe(arguments.device)}\n"
          f"batches of {arguments.batch}, {arguments.size}²; MiB, and over those of {PLAIN}\n\n{'':<47}{head}")
    for model in arguments.models:
        plain: dict[str, int] = {}
        for contestant in dict.fromkeys([PLAIN, *arguments.contestants]):
            figures = in_own_process(contestant, model, arguments)
            plain = plain or figures
            shown = "".join(f"{figures[kind] / 2**20:>8.0f}{figures[kind] / plain[kind]:>7.2f}" for kind in figures)
            print(f"{model:<13}{contestant:<34}{shown}", flush=True)


if __name__ == "__main__":
    main()
