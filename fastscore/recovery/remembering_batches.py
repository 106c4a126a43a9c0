"""Batches, and what a dense network has made of them: measured once, whoever asks for it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from fastscore.batches.parts import Batch
from fastscore.recovery.calibration import Part
from fastscore.recovery.divergence import Outputs
from fastscore.recovery.moments import Moments

T = TypeVar("T")


@dataclass
class DenseOutputs:
    """What the dense network returns for samples held out, batch by batch."""

    rows: list[Outputs] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = list(state["rows"])


class RememberingBatches:
    """Batches that remember what one dense network, called in one way, has made of them.

    A cut is measured, repaired, compared with others, and a search or a curve repairs many: all that follows from the
    dense network alone is the same each time. name: what the argument that they came in is called, where errors name
    it. moments: part -> layer -> of what it reads. outputs: for the samples held out.
    """

    def __init__(self, batches: Iterable[Batch], name: str = "batches") -> None:
        self._batches, self.name = batches, name
        self.moments: dict[Part, dict[str, Moments]] = defaultdict(dict)
        self.outputs = DenseOutputs()
        self._once: list[tuple[object, Any]] = []

    @classmethod
    def of(cls, batches: Iterable[Batch], name: str = "batches") -> "RememberingBatches":
        """Themselves, under the name that they have, where they remember already."""
        return batches if isinstance(batches, RememberingBatches) else cls(batches, name)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` made for this very object."""
        found: T | None = next((made for known, made in self._once if known is key), None)
        if found is None:
            found = make()
            self._once.append((key, found))
        return found

    def unseen(self, part: Part, index: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those layers of which there are no moments, or of inputs looked at otherwise; see `layouts`."""
        known = self.moments[part]
        return {name: where for name, where in index.items()
                if name not in known or known[name].index.shape != where.shape
                or bool((known[name].index != where).any())}
