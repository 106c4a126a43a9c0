"""What a layer has done already of the module that follows it: that one has nothing left to do, but it has to follow.

The first batch shows what follows a layer. A model whose code decides by the numbers of a batch may go another way in a
later one, past the clamp that the layer has taken, or the BatchNorm that it holds.
"""

import weakref
from typing import Literal

from torch import Tensor

Follower = Literal["clamp", "BatchNorm"]


class DoneAhead:
    """Outputs of layers that hold what a module behind them is called for, until it is called."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Follower, weakref.ref[Tensor]]] = []

    def add(self, layer: str, follower: Follower, output: Tensor) -> None:
        """`output`, of a layer of that name, is to be handed to `follower`."""
        self._waiting.append((layer, follower, weakref.ref(output)))

    def take(self, follower: Follower, x: Tensor) -> bool:
        """Whether a module of that kind, called on x, has nothing left to do."""
        for at, (_, kind, output) in enumerate(self._waiting):
            if kind == follower and output() is x:
                del self._waiting[at]
                return True
        return False

    def start(self) -> None:
        """A pass begins."""
        self._waiting.clear()

    def finish(self) -> None:
        """The forward pass has ended.

        Raises RuntimeError, naming the layer, where a follower was not called."""
        if self._waiting:
            layer, follower, _ = self._waiting[0]
            raise RuntimeError(f"{layer}: the {follower} behind it, which ran in the first batch, did not in this one, "
                               "and the layer has done its work already; score batches that take another way through "
                               "the model apart, and merge() the scores")
