"""What prune() is asked for: budgets, the order in which channels go, and what stands in for them. Every check of these
stands here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from fastscore.arguments import check_flag, check_number, check_whole
from fastscore.pruning.budgets.costs import Resource
from fastscore.recovery.reconstruct import Method
from fastscore.scoring.scores import Scores
from fastscore.wording import and_like_it

Scope = Literal["global", "layer", "isomorphic"]


_OF = {"latency": "of the dense model's time, not milliseconds, that"}


@dataclass(frozen=True)
class Budgets:
    """What remains of the original: shares, 0 < share <= 1, of the channels that can go, the parameters, the
    multiply-accumulates, and the time of a call, measured; None for what is not limited."""

    channels: float | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name, share in self.given.items():
            check_number(name, share, "0.5")
            if not 0 < share <= 1:
                raise ValueError(f"{name}: {share} is outside (0, 1]; it is the share {_OF.get(name, 'that')} remains"
                                 + (f": {share / 100:g} for {share:g} %" if 2 <= share <= 100 else ", such as 0.7"))

    @property
    def given(self) -> dict[str, float]:
        """Name -> share, of those that there are."""
        return {name: share for name, share in asdict(self).items() if share is not None}

    @property
    def counted(self) -> dict[Resource, float]:
        """Those that are counted and not measured."""
        every: dict[Resource, float | None] = {"channels": self.channels, "params": self.params, "macs": self.macs}
        return {resource: share for resource, share in every.items() if share is not None}

    def require_one(self, call: str, more: str = "") -> "Budgets":
        """Itself. Raises ValueError, naming the function that was called, where there is no budget. more: what may be
        given in the place of one."""
        if not self.given:
            raise ValueError(f"{call}: name a budget: channels=, params=, macs= or latency=, what remains of the "
                             f"original{more}")
        return self


@dataclass(frozen=True)
class Ranking:
    """In which order channels go, how many stay where, and of which multiples.

    cost_aware: rank by importance per cost; None: where that makes sense (see fastscore.pruning.order.ranking). scope,
    round_to, floor: as fastscore.prune takes them.
    """

    scope: Scope = "global"
    cost_aware: bool | None = None
    round_to: int | Literal["auto"] = 1
    floor: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope: {self.scope!r} is none of {', '.join(get_args(Scope))}")
        check_flag("cost_aware", self.cost_aware)
        if self.cost_aware and self.scope == "layer":
            raise ValueError('cost_aware: scope="layer" compares no layer with another: use "global" or "isomorphic"')
        if not isinstance(self.round_to, str):
            check_whole("round_to", self.round_to, "8")
        if (self.round_to != "auto") if isinstance(self.round_to, str) else (self.round_to < 1):
            raise ValueError(f"round_to: {self.round_to!r}; it must be 'auto', or 1 or more")
        for share in self.floor.values() if isinstance(self.floor, Mapping) else (self.floor,):
            check_number("floor", share, "0.1")
            if not 0 <= share <= 1:
                raise ValueError(f"floor: {share} is outside [0, 1]; it is the share of each group's channels that "
                                 "stays")


def multiple(round_to: int | Literal["auto"] | None, latency: float | None, clock: str) -> int | Literal["auto"]:
    """What widths are to be multiples of; None leaves it to the clock by which a time is measured: ONNX Runtime and
    OpenVINO lay channels out in blocks, and are slow at widths that fill none."""
    if round_to is not None:
        return round_to
    return 1 if latency is None or clock == "torch" else "auto"


def check_repair(repair: Method, calibration: object, compensate: bool | None, held_out: object, judged: bool) -> None:
    """Raise ValueError for a method there is none of, and for batches and methods that do not go together.

    judged: whether there is a quality to judge by batches held out.
    """
    if repair not in get_args(Method):
        raise ValueError(f"repair: {repair!r} is none of {', '.join(get_args(Method))}")
    if held_out is not None and not judged:
        raise ValueError("held_out: agreement= and kl= are judged by it: give one of them, or leave it out")
    if calibration is None and repair != "auto":
        raise ValueError(f"repair: {repair!r} is fitted to samples: give calibration=batches, too")
    if calibration is not None and compensate is False:
        raise ValueError("calibration: it is there to repair by, which compensate=False forbids: give one of them")


def resolve_compensate(compensate: bool | None, scores: Scores) -> bool:
    """Whether to compensate; None: where the scores hold means. Raises ValueError for True without them, TypeError for
    what is neither a bool nor None."""
    check_flag("compensate", compensate)
    if compensate and not scores.means:
        raise ValueError(f"compensate: scores by {scores.origin.importance!r} (reduction={scores.origin.reduction!r}) "
                         "hold no mean activations: score with a taylor importance and reduction=\"sum\", or lend them "
                         "those of such scores: dataclasses.replace(scores, means=other.means)")
    return bool(scores.means) if compensate is None else compensate


def say_unread(scores: Scores) -> dict[str, str]:
    """A note on layers that have no mean to compensate with; empty where all have."""
    unread = [layer for layer, mean in scores.means.items() if not mean.numel()]
    return {"means": f"{and_like_it(unread)} read nothing for some samples, and so no mean of what goes: nothing is "
                     "added to its bias"} if unread else {}


def say_compensation(means: bool, compensate: bool | None, scores: Scores) -> str:
    """What stands in for channels that go, where no calibration batches repair: a line of the report."""
    if means:
        return "removed channels: what they gave on average is in biases"
    why = "compensate=False" if compensate is False else \
        f"scores by {scores.origin.importance} hold no means; calibration=batches measures them"
    return f"removed channels: read as zero ({why})"
