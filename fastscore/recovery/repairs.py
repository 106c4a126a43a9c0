"""A repair that was tried: what it was, and how far the smaller network then was from the dense one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastscore.recovery.divergence import Mixed, each_of, figures, names

FAR = 4.0  # times a divergence: so much more is no matter of which samples were fitted to
ROUNDING = 1e-6  # of a divergence: networks that differ by less are not told apart


@dataclass(frozen=True)
class Repair:
    """A repair that was tried, and how far the smaller network then was from the dense one on samples held out.

    name: what was done. ridge: of a linear reconstruction, None of anything else. recalibrated: whether the BatchNorms
    were, after that. chosen: whether it is the one returned, then fitted on the held-out samples too (but where the
    report's note "last fit" says otherwise). stiffness: of an asymmetric one: how many times the ridge that is best for
    a layer alone every layer has. decisions: how many were compared. outputs: of a network with several outputs,
    (agreement, KL) of each. by_error, mixed: as in Divergence.
    """

    name: str
    ridge: float | None
    recalibrated: bool
    agreement: float
    kl: float
    chosen: bool = False
    stiffness: float = 1.0
    decisions: int = 0
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    by_error: bool = False
    mixed: Mixed = ""

    @property
    def how(self) -> str:
        """What was done, in words."""
        ridge = "" if self.ridge is None else f", ridge {self.ridge:g}"
        ridge += f", stiffness {self.stiffness:g}" if self.stiffness != 1 else ""
        return f"{self.name}{ridge}{', BatchNorms recalibrated' if self.recalibrated else ''}"

    def __str__(self) -> str:
        return (f"{'chosen' if self.chosen else 'tried'}: {self.how}: "
                f"{figures(self.agreement, self.kl, self.by_error, self.mixed)}{each_of(self.outputs)}")

    @staticmethod
    def is_far_further(kl: float, other: float) -> bool:
        """Whether a network of the one divergence is far further from the dense one than a network of the other."""
        return not kl <= FAR * other + ROUNDING

    def compared(self, kl: float, other: float) -> str:
        """Two divergences of this kind, in words."""
        return f"{names(self.by_error, self.mixed)[1]} {kl:.3g} against {other:.3g}"
