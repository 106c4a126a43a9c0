"""How long repairs will take, said before they start: in passes over the images, of which one is timed."""

import argparse
import time

import torch
from torch import nn

from fastscore.batches.outputs import output_tensors
from fastscore.cli import images, options
from fastscore.modules.inspection import device_of
from fastscore.pruning.order.measured import SAMPLES, SHARES
from fastscore.recovery.calibration import HELD_OUT
from fastscore.rng import fork_rng
from fastscore.wording import lasting

REPAIR = 26  # passes that all repairs of a network take, as measured (docs/recovery.md)
SHORT = 20.0  # seconds of which nothing is said


def passes(samples: int, networks: int, groups: int) -> float:
    """How many passes over so many samples the repairs of so many networks take, and to measure so many groups of
    channels once."""
    return REPAIR * networks + len(SHARES) * groups * min(SAMPLES, samples / HELD_OUT / 2) / samples


def tell(model: nn.Module, work: images.ImageBatches, arguments: argparse.Namespace, networks: int, groups: int = 0
         ) -> None:
    """Say what is to come where it is long, and the way out: of "auto" and "asymmetric", which fit layer by layer.

    networks: that are repaired. groups: of channels, that may be measured.
    """
    if arguments.repair not in ("auto", "asymmetric"):
        return
    samples = sum(map(len, work.chunks))
    count = passes(samples, networks, 0 if arguments.measured is False else groups)
    seconds = count * _of_a_pass(model, work, samples)
    if seconds > SHORT:
        several = "" if networks == 1 else f" of {networks} networks"
        options.tell(f"the repair{several} takes about as long as {count:.0f} passes over the {samples:,} images: some "
                     f"{lasting(seconds)} here, more where they are few; --repair linear takes {2 * networks} passes")


def _of_a_pass(model: nn.Module, work: images.ImageBatches, samples: int) -> float:
    """Seconds, from the first batch."""
    device = device_of(model)
    with fork_rng(device), torch.no_grad():
        batch = next(iter(work))  # images are decoded once
        start = time.perf_counter()
        output_tensors(model(batch.to(device)), type(model).__name__)[0].cpu()
        return (time.perf_counter() - start) * samples / len(batch)
