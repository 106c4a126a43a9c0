"""A backward pass whose sums are computed, and of which is not known yet whether they are finite.

To look at a number on a device is to wait for all that was asked of it. So what decides whether a pass counts is copied
to the host while the next pass is on its way, and read when that has been asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastscore.batches.devices import has_float64
from fastscore.taps.passes import ForwardPass


class Flags:
    """Numbers on a device, [K], on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._arrived = values, None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The numbers, once they have come."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.tolist()
        return values


class Share(NamedTuple):
    """What one backward pass adds to sums under names, side by side: [..., ΣC]."""

    names: tuple[str, ...]
    widths: Sequence[int]
    values: Tensor


@dataclass(frozen=True)
class Pending:
    """What one backward pass adds to totals, if it is finite.

    Attributes:
        totals: of groups. means: of layers, if these samples are new.
        numbers: [the largest magnitude of what is added and divided by, the number of gradients of length 0].
        even, odd: samples (or minibatches) of each half. samples: of them, those seen for the first time.
        reached: layers with a tap that the pass came to.
        culprit: the name of the first tensor that is not finite, where one is not.
        done: the forward pass, where it is known.
    """

    totals: list[Share]
    means: list[Share]
    numbers: Tensor
    even: int
    odd: int
    samples: int
    reached: Sequence[str]
    culprit: Callable[[], str]
    done: ForwardPass | None = None
    flags: Flags | None = None  # the numbers, on their way

    def copied(self) -> "Pending":
        """The same in memory of its own, without what it was computed from."""
        def clones(shares: list[Share]) -> list[Share]:
            return [share._replace(values=share.values.clone()) for share in shares]

        return replace(self, totals=clones(self.totals), means=clones(self.means), numbers=self.numbers.clone(),
                       culprit=lambda: "a pass that was replayed", done=None)

    def sent(self) -> "Pending":
        """The same with its numbers on their way to the host."""
        return replace(self, flags=Flags(self.numbers))


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude among them, float64 scalar: NaN or infinite as soon as one of them is."""
    found = [torch.linalg.vector_norm(tensor.detach(), torch.inf, dtype=torch.float64) if has_float64(tensor.device)
             else torch.linalg.vector_norm(tensor.detach(), torch.inf).cpu().double() for tensor in tensors
             if tensor.numel()]
    if not found:
        return torch.zeros((), dtype=torch.float64)
    return found[0] if len(found) == 1 else torch.stack([each.to(found[0].device) for each in found]).amax()
