"""How far a smaller network's decisions are from the dense one's: no labels needed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from fastscore.batches import with_float64
from fastscore.wording import counted


@dataclass(frozen=True)
class Divergence:
    """agreement: the share of decisions that are the dense network's. kl: the mean of KL(dense ‖ smaller) in nats.

    decisions: how many were compared; a token or pixel is one where outputs have several.
    """

    agreement: float
    kl: float
    decisions: int

    def __str__(self) -> str:
        return f"agreement {self.agreement:.1%}, KL {self.kl:.3g}"


def judged_by(decisions: int, samples: str) -> str:
    """What a share of decisions about some samples rests on; of fewer than 100, by how much it may be off, too."""
    few = "" if decisions >= 100 else \
        f": few, so a share of them may well be off by {50 / math.sqrt(decisions):.0f} points"
    return f"judged by {counted(decisions, 'decision')} about samples that {samples}{few}"


def divergence(dense: Iterable[Tensor], smaller: Iterable[Tensor],
               process_group: distributed.ProcessGroup | None = None) -> Divergence:
    """Compare what two networks return for the same batches, batch by batch.

    dense, smaller: logits [N, K], [N, T, K], or [N, K, H, W] (and with any other number of sizes behind the K). A
    single logit stands for two classes, as with a sigmoid. Not finite in the smaller one's: no agreement, infinite KL.
    Raises ValueError where there is nothing to compare, or shapes differ.
    """
    agreed = total = 0.0
    decisions = 0
    for expected, got in zip(dense, smaller, strict=True):
        if expected.shape != got.shape:
            raise ValueError(f"outputs: the dense network returns {list(expected.shape)} and the smaller one "
                             f"{list(got.shape)}")
        p, q = _logits(expected), _logits(got.to(expected.device))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        finite = torch.isfinite(q).all(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float(torch.where(finite, kl, torch.inf).sum())
        agreed += float(((p.argmax(-1) == q.argmax(-1)) & finite).sum())
        decisions += kl.numel()
    if process_group is not None:
        sums = torch.tensor([agreed, total, decisions], dtype=torch.float64)
        sums = sums.to(_device_of(process_group))
        distributed.all_reduce(sums, group=process_group)
        agreed, total, decisions = float(sums[0]), float(sums[1]), int(sums[2])
    if not decisions:
        raise ValueError("outputs: there are none to compare")
    return Divergence(agreed / decisions, max(total / decisions, 0.0), decisions)


def _logits(output: Tensor) -> Tensor:
    """float64 [decisions, K]."""
    x = with_float64(output.detach()).double()
    if x.dim() == 1:
        x = x[:, None]
    if x.dim() > 3:  # [N, K, H, W]
        x = x.movedim(1, -1)
    x = x.flatten(0, -2)
    return torch.cat([torch.zeros_like(x), x], -1) if x.shape[-1] == 1 else x


def _device_of(process_group: distributed.ProcessGroup) -> torch.device:
    """A device on which the processes can add up."""
    return torch.device("cuda" if distributed.get_backend(process_group) == "nccl" else "cpu")
