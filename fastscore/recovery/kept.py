"""What a repair has measured so far, in a file: a run that was stopped goes on from there, with the same sums."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

from torch import distributed, nn

from fastscore.batches.calls import Forward
from fastscore.batches.devices import rank_and_size
from fastscore.batches.parts import Batch
from fastscore.fingerprints import digest_of, run_fingerprint
from fastscore.graph.cutting.surgery import RemovedIndices
from fastscore.modules.inspection import device_of
from fastscore.scoring.run_file import RunFile, remaining

FORM = "fastscore-moments-2"


class Sum(Protocol):
    """What batches add to, and what its state brings back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Pass:
    """Batches that are in the sums, a digest of what they held, whether they are all, and the sums by name."""

    done: int = 0
    digest: str = ""
    whole: bool = False
    sums: Mapping[str, Mapping[str, Any]] | None = None


class KeptPasses:
    """Passes over batches, each known by a name, whose sums are kept in the file at `path`, if there is one.

    model: the dense one, and `removed` what goes from it: with `forward`, what makes a run the same. process_group:
    processes that share the batches; each has a file of its own.
    """

    def __init__(self, path: str | PathLike[str] | None, model: nn.Module, removed: RemovedIndices, forward: Forward,
                 process_group: distributed.ProcessGroup | None = None) -> None:
        self._file: RunFile | None = None
        self._passes: dict[str, _Pass] = {}
        if path is None:
            return
        rank, size = rank_and_size(process_group)
        gone = json.dumps(sorted((name, side, index.tolist()) for (name, side), index in removed.items()))
        identity = run_fingerprint(model, {}, removed=hashlib.sha256(gone.encode()).hexdigest(), forward=forward)
        self._file = RunFile(path, FORM, "file of reconstruct(resume=)", {**identity, "process": [rank, size]}, rank,
                             size, device_of(model))
        found = self._file.load()
        if found is not None:
            self._passes = {name: _Pass(**each) for name, each in found["passes"].items()}

    def pass_over(self, batches: Iterable[Batch], name: str, sums: Mapping[str, Sum]) -> Iterator[Batch]:
        """The batches that are not in `sums` yet, once these are what the file holds of the pass; whoever takes a batch
        adds all of it before the next. Batches that are in them already are read and compared.

        Raises ValueError where they are not those that were added.
        """
        if self._file is None:
            yield from batches
            return
        before = self._passes.get(name, _Pass())
        for key, state in (before.sums or {}).items():
            sums[key].load_state_dict(state)
        done, digest = before.done, before.digest

        def note(whole: bool) -> None:
            self._passes[name] = _Pass(done, digest, whole, {key: each.state_dict() for key, each in sums.items()})
            assert self._file is not None
            self._file.save({"passes": {name: vars(each) for name, each in self._passes.items()}})

        for batch in remaining(batches, done, digest, self._file.path):
            if before.whole:
                raise ValueError(f"batches: {self._file.path} has seen {done}, and there are more; give the same "
                                 "again, or remove the file")
            added = digest_of(digest, batch)
            yield batch
            done, digest = done + 1, added
            if self._file.due:
                note(whole=False)
        if not before.whole:
            note(whole=True)
