"""Files that a command writes: whether they can be, before any work; what was written, after it."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from fastscore import plots
from fastscore.pruning.saved.export import check_suffix


def _is_one_of(suffixes: tuple[str, ...], what: str, path: str) -> None:
    if Path(path).suffix not in suffixes:
        raise ValueError(f"out: {path}: its suffix must be {suffixes[0]} ({what})")


# command -> raises for an --out whose suffix is that of another kind of file
_SUFFIX: Mapping[str, Callable[[str], object]] = {
    "demo": partial(plots.check, argument="out"), "prune": partial(check_suffix, argument="out"),
    "score": partial(_is_one_of, (".safetensors", ""), "scores, for prune --scores"),
    "curve": partial(_is_one_of, (".json",), "for report --curve; --plot draws it"),
    "report": partial(_is_one_of, (".html", ".htm"), "a page")}


def check_out(arguments: argparse.Namespace) -> None:
    """Raise ValueError, before any work, for a file that could not be written (no folder, or a folder in its place),
    would take the place of one that is read, or has the suffix of another kind of file; ImportError without what it
    is written by."""
    read = {name: Path(value) for name in ("scores", "checkpoint", "curve") if (value := vars(arguments).get(name))}
    written = {name: Path(value) for name in ("out", "plot", "resume") if (value := vars(arguments).get(name))}
    for name, path in written.items():
        for other, file in {**read, **written}.items():
            if name != other and path.resolve() == file.resolve():
                raise ValueError(f"{name}: {path} is the file of {other}, too; name another")
        if not path.parent.is_dir():
            raise ValueError(f"{name}: {path}: there is no folder {path.parent} to write it in; make it first")
        if path.is_dir():
            raise ValueError(f"{name}: {path}: it is a folder; name a file in it")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(f"{name}: {path}: nothing can be written to {path.parent} ({error.strerror}); name a "
                             "file elsewhere") from error
    if "out" in written:
        _SUFFIX[arguments.command](arguments.out)
    if "plot" in written:
        plots.check(arguments.plot, "plot")


def wrote(*paths: str | None) -> None:
    """Say what was written."""
    for path in paths:
        if path is not None:
            print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.2f} MB)", file=sys.stderr)
