"""Ctrl-C while the command line still imports PyTorch, which takes seconds: a line in place of a traceback.

Importing this file does it, where the process is the command `fastscore` or `python -m fastscore`, and nowhere else; so
fastscore's __init__.py imports it before all that imports torch.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

SAID = "fastscore: interrupted"
EXIT_CODE = 130


def is_command() -> bool:
    """Whether this process was started as `fastscore`, or by `python -m fastscore`."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        given = sys.orig_argv
        return "-m" in given[:-1] and given[given.index("-m") + 1] == "fastscore"
    return Path(sys.argv[0] if sys.argv else "").stem == "fastscore"


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt from now on, as usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    print(SAID, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)  # nothing is done yet, and an exception that passes through imports leaves them in halves


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
