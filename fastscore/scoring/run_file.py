"""A file that keeps a run, so that it can be stopped at any moment and go on; read again, it is told from another
run's, and its batches from others."""

import time
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastscore import files
from fastscore.arguments import check_path
from fastscore.batches.parts import Batch
from fastscore.fingerprints import digest_of

SHARE = 0.02  # of the time, at most, goes into saving


class RunFile:
    """Where a run is kept: a file for each of the processes that share it, PATH.RANK-of-SIZE where they are several.

    form: what kind of file it is, with its version. what: what it is called in errors. identity: what makes a run the
    same one (see fastscore.fingerprints), as JSON gives it back. device: where tensors go that were not on the CPU.
    """

    def __init__(self, path: str | PathLike[str], form: str, what: str, identity: Mapping[str, Any], rank: int = 0,
                 size: int = 1, device: torch.device | None = None) -> None:
        check_path("resume", path)
        self._whole, self._form, self._what, self._identity = Path(path), form, what, identity
        self._size, self._device, self._next_save = size, device, 0.0
        self.path = self._whole if size == 1 else self._whole.with_name(f"{self._whole.name}.{rank}-of-{size}")

    def load(self) -> dict[str, Any] | None:
        """What was saved; None where nothing was. Raises ValueError for a file that is damaged or of another run, or of
        another number of processes."""
        if not self.path.exists():
            others = sorted(other.name for other in self.path.parent.glob(f"{self._whole.name}*-of-*")
                            if not other.name.endswith(f"-of-{self._size}"))
            if others:
                raise ValueError(f"resume: {others[0]} was written by another number of processes than these "
                                 f"{self._size}; start as many again, or remove it")
            return None
        state = files.read_state(self.path, self._form, self._what, "remove it to start over", self._device)
        differing = [name for name, value in self._identity.items() if state["identity"].get(name) != value]
        if differing:
            raise ValueError(f"resume: {self.path} is of another run, which differs in {', '.join(differing)}; "
                             "name another file, or remove it to start over")
        return state

    @property
    def due(self) -> bool:
        """Whether a save would take no more than its share of the time since the last."""
        return time.monotonic() >= self._next_save

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state in place of the one before, whole or not at all."""
        start = time.monotonic()
        files.write_state(self.path, self._form, {"identity": self._identity, **state})
        self._next_save = time.monotonic() + (time.monotonic() - start) / SHARE


def remaining(batches: Iterable[Batch], done: int, digest: str, path: Path) -> Iterator[Batch]:
    """The batches that follow the first `done`, which are read and compared with `digest`, a chain over their content.

    Raises ValueError where they are not those that the file at `path` has seen.
    """
    count, seen = 0, ""
    for batch in batches:
        if count == done:
            yield batch
            continue
        count, seen = count + 1, digest_of(seen, batch)
        if count == done and seen != digest:
            raise ValueError(f"batches: the first {done} are not those in {path}, or not in that order; give the same "
                             "again (shuffle=False, or a seeded sampler), or remove the file")
    if count < done:
        raise ValueError(f"batches: {path} has seen {done}, and there are {count}; give the same again, or remove the "
                         "file")
