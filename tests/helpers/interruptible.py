"""A working directory for the command line: images, and a network that can be interrupted, or put to sleep, in any of
its calls."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import working_folder

from fastscore.cli import main

# $SAMPLES: only calls with as many are counted. $STOP: in this call Ctrl-C is pressed. $SLEEP: in this one it sleeps,
# once it has made the file $REACHED.
NETS = """
import os, pathlib, signal, time
from torch import nn

class Net(nn.Sequential):
    calls = 0

    def forward(self, x):
        if len(x) == int(os.environ.get("SAMPLES", len(x))):
            Net.calls += 1
            if Net.calls == int(os.environ.get("STOP", 0)):
                os.kill(os.getpid(), signal.SIGINT)
            if Net.calls == int(os.environ.get("SLEEP", 0)):
                pathlib.Path(os.environ["REACHED"]).touch()
                time.sleep(60)
        return super().forward(x)

def build():
    return Net(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""
MODEL = ("nets.py:build", "--images", "photos", "--size", "12", "--batch-size", "4")


@contextmanager
def folder(place: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> Iterator[None]:
    """In `place`, with nets.py and so many images in photos/; a real Ctrl-C is heard."""
    pixels = torch.randint(256, (images, 12, 12, 3), generator=torch.Generator().manual_seed(0)).byte()
    working_folder.enter(place, monkeypatch, NETS, pixels)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def run(arguments: Sequence[str], stop: int = 0) -> int:
    """The command's exit code, as in a process of its own; Ctrl-C in call number `stop`."""
    sys.modules.pop("nets", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP", str(stop))
        return main(arguments)


def calls() -> int:
    """How often the last run called the network."""
    return int(sys.modules["nets"].Net.calls)
