"""`python -m benchmarks.passes.memory`: the most memory that scoring takes, each contestant in a process of its own.

whole call: above what lives before it; that of fastscore traces and makes its copy of the model with weights of its
own, and then scores three batches. pass alone: the last of these batches, or loss.backward() likewise, above what
lives before it (weights, the copy, the batch).

RSS is the growth of the process's resident memory at its peak, as the kernel counts it (VmHWM, set back through
/proc/self/clear_refs just before, when malloc has given back what is free); it depends on malloc. Tensors is the peak
of live tensor bytes, which does not. The code has been loaded, by a pass over a small network.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from benchmarks import machine
from benchmarks.peers.contestants import BASELINE, CONTESTANTS
from benchmarks.peers.measure import PeakBytes, Stopwatch
from benchmarks.peers.task import Prepare, Task

PLAIN = "forward and backward alone"
DEFAULT = (PLAIN, BASELINE, "plain hooks, frozen", "fastscore, random", "fastscore, bfloat16")


class PeakResident(Stopwatch):
    """Used as a Stopwatch is; `bytes`: by how much the process's resident memory grew in the latest block, at most."""

    bytes = 0

    def __enter__(self) -> "PeakResident":
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc's own; others keep what they keep
        self._before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.bytes = _resident("VmHWM") - self._before


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS at this moment, VmHWM at most since the peak was set back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


METERS = {"RSS": PeakResident, "tensors": PeakBytes}


def growth(prepare: Prepare, task: Task) -> dict[str, dict[str, int]]:
    """Bytes: {"whole call", "pass alone"} -> {"RSS", "tensors"}; tensors alone on a GPU."""
    device = task.images.device.type
    load_code(prepare, device)
    found: dict[str, dict[str, int]] = {"whole call": {}, "pass alone": {}}
    for kind in kinds(device):
        around, inside = METERS[kind](device), METERS[kind](device)
        with around:
            prepare(task)(Stopwatch(device))
        prepare(task)(inside)
        found["whole call"][kind], found["pass alone"][kind] = around.bytes, inside.bytes
    return found


def kinds(device: str) -> tuple[str, ...]:
    """What can be measured there, of METERS."""
    return tuple(METERS) if device == "cpu" else ("tensors",)


def load_code(prepare: Prepare, device: str) -> None:
    """Run the contestant on a network of a few kilobytes, so that libraries and kernels are in memory."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval().to(device)
    small = Task.of(model, torch.randn(2, 3, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    prepare(small)(Stopwatch(device))


def in_own_process(contestant: str, model: str, batch: int, arguments: argparse.Namespace
                   ) -> dict[str, dict[str, int]]:
    """`growth` of a fresh process with the same settings."""
    command = [sys.executable, "-m", "benchmarks.passes.memory", "--child", contestant, "--models", model,
               f"--batches={batch}", *(f"--{name}={getattr(arguments, name)}"
                                       for name in ("size", "device", "threads", "layout", "allocator"))]
    done = subprocess.run(command, env=machine.malloc_environment(arguments.allocator), capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{contestant} on {batch} images, {model}, failed:\n{done.stderr}")
    figures: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=tuple(CONTESTANTS),
                        metavar="NAME", help=f"of: {'; '.join(CONTESTANTS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="images at a time (default: 8 32)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--child", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    machine.add_arguments(parser, allocator="default")
    arguments = parser.parse_args()
    machine.settle(arguments)
    if arguments.child:
        task = Task.random(arguments.models[0], arguments.batches[0], arguments.size, arguments.device,
                           arguments.layout)
        print(json.dumps(growth(CONTESTANTS[arguments.child], task)))
        return
    columns = [(part, kind) for part in ("whole call", "pass alone") for kind in kinds(arguments.device)]
    print(f"{machine.describe(arguments.device)}\n"
          f"images of {arguments.size}²; MiB, and over those of {PLAIN}\n\n{'':<53}"
          + "".join(f"{part:>15}" for part, _ in columns)
          + f"\n{'':<13}{'batch':>5}{'':<35}" + "".join(f"{kind:>15}" for _, kind in columns), flush=True)
    for model in arguments.models:
        for batch in arguments.batches:
            plain: dict[str, dict[str, int]] = {}
            for contestant in dict.fromkeys([PLAIN, *arguments.contestants]):
                figures = in_own_process(contestant, model, batch, arguments)
                plain = plain or figures
                shown = "".join(f"{figures[part][kind] / 2**20:>8.0f}{figures[part][kind] / plain[part][kind]:>7.2f}"
                                for part, kind in columns)
                print(f"{model:<13}{batch:>5} {contestant:<34}{shown}", flush=True)


if __name__ == "__main__":
    main()
