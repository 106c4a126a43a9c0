"""How far a smaller network's decisions are from the dense one's: no labels needed."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from fastscore.batches import with_float64
from fastscore.wording import counted

Outputs: TypeAlias = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Divergence:
    """agreement: the share of decisions that are the dense network's. kl: the mean of KL(dense ‖ smaller) in nats.

    decisions: how many were compared; a token or pixel is one where outputs have several. outputs: of a network with
    several outputs, each by itself; agreement, and how many were compared, is then that of the output that agrees
    least, and kl the sum of all.
    """

    agreement: float
    kl: float
    decisions: int
    outputs: Mapping[str, "Divergence"] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"agreement {self.agreement:.1%}, KL {self.kl:.3g}" + \
            each_of({name: (each.agreement, each.kl) for name, each in self.outputs.items()})


def each_of(outputs: Mapping[str, tuple[float, float]]) -> str:
    """What each of several outputs has: name -> (agreement, KL)."""
    rows = "; ".join(f"{name} {agreement:.1%}, {kl:.3g}" for name, (agreement, kl) in outputs.items())
    return f" ({rows})" if rows else ""


def judged_by(decisions: int, samples: str) -> str:
    """What a share of decisions about some samples rests on; of fewer than 100, by how much it may be off, too."""
    few = "" if decisions >= 100 else \
        f": the true share may be up to {math.ceil(100 * most_off(decisions))} points off (95 % confidence)"
    return f"judged by {counted(decisions, 'decision')} about samples that {samples}{few}"


@functools.lru_cache(1024)
def least_share(successes: int, trials: int, confidence: float) -> float:
    """The lower end of Clopper and Pearson's one-sided interval for the probability of a success."""
    if successes == 0:
        return 0.0
    count = torch.arange(successes, trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(count + 1) - torch.lgamma(trials - count + 1)
    low, high = 0.0, 1.0
    for _ in range(60):  # the probability of as many successes or more grows with p
        p = (low + high) / 2
        tail = float((ways + count * math.log(p) + (trials - count) * math.log1p(-p)).logsumexp(0).exp())
        low, high = (p, high) if tail < 1 - confidence else (low, p)
    return low


@functools.lru_cache(128)
def most_off(decisions: int) -> float:
    """How far a share of so many decisions is from the end of its two-sided 95 % interval (Clopper, Pearson 1934), at
    most: whatever the share is, and up as down, as the interval of the other share is this one mirrored."""
    return max(agreed / decisions - least_share(agreed, decisions, 0.975) for agreed in range(decisions + 1))


def divergence(dense: Iterable[Outputs], smaller: Iterable[Outputs],
               process_group: distributed.ProcessGroup | None = None) -> Divergence:
    """Compare what two networks return for the same batches, batch by batch.

    dense, smaller: logits [N, K], [N, T, K], or [N, K, H, W] (and with any other number of sizes behind the K), or
    several by name. A single logit stands for two classes, as with a sigmoid. Not finite in the smaller one's: no
    agreement, infinite KL. Raises ValueError where there is nothing to compare, or shapes differ.
    """
    sums: dict[str, Tensor] = {}
    for all_expected, all_got in zip(dense, smaller, strict=True):
        expected_ones, got_ones = _by_name(all_expected), _by_name(all_got)
        if expected_ones.keys() != got_ones.keys():
            raise ValueError(f"outputs: the dense network returns {', '.join(expected_ones)} and the smaller one "
                             f"{', '.join(got_ones)}")
        for name, expected in expected_ones.items():
            added = _compared(expected, got_ones[name])
            sums[name] = sums[name] + added if name in sums else added
    if process_group is not None:  # a process may have had no batch, and know of no output
        gathered: list[Any] = [None] * process_group.size()
        distributed.all_gather_object(gathered, {name: row.tolist() for name, row in sums.items()}, process_group)
        sums = {name: torch.tensor([each[name] for each in gathered if name in each], dtype=torch.float64).sum(0)
                for name in dict.fromkeys(name for each in gathered for name in each)}
    if not sums or any(not row[2] for row in sums.values()):
        raise ValueError("outputs: there are none to compare")
    found = {name: Divergence(float(row[0] / row[2]), max(float(row[1] / row[2]), 0.0), int(row[2]))
             for name, row in sums.items()}
    least = min(found.values(), key=lambda each: each.agreement)
    if len(found) == 1:
        return least
    return Divergence(least.agreement, sum(each.kl for each in found.values()), least.decisions, found)


def _by_name(outputs: Outputs) -> Mapping[str, Tensor]:
    return {"": outputs} if isinstance(outputs, Tensor) else outputs


def _compared(expected: Tensor, got: Tensor) -> Tensor:
    """float64 [3]: decisions that agree, the sum of the KL divergences, decisions."""
    if expected.shape != got.shape:
        raise ValueError(f"outputs: the dense network returns {list(expected.shape)} and the smaller one "
                         f"{list(got.shape)}")
    p, q = _logits(expected), _logits(got.to(expected.device))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    finite = torch.isfinite(q).all(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    agreed = (p.argmax(-1) == q.argmax(-1)) & finite
    return torch.stack([agreed.sum().double(), torch.where(finite, kl, torch.inf).sum(),
                        torch.tensor(float(kl.numel()), dtype=torch.float64, device=kl.device)]).cpu()


def _logits(output: Tensor) -> Tensor:
    """float64 [decisions, K]."""
    x = with_float64(output.detach()).double()
    if x.dim() == 1:
        x = x[:, None]
    if x.dim() > 3:  # [N, K, H, W]
        x = x.movedim(1, -1)
    x = x.flatten(0, -2)
    return torch.cat([torch.zeros_like(x), x], -1) if x.shape[-1] == 1 else x
