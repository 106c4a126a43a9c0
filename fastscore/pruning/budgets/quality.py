"""A quality budget: the smallest network along the removal order that still decides as the dense one does.

Candidates are found by bisection in the MACs that are counted, each repaired, and judged on samples that no repair has
seen. Where the next step is a large one, and fails, smaller ones behind it are tried in its place. With a confidence,
the samples to judge by are halved: on one half the bisection runs, the other tests what has passed there, and before it
three larger networks, from the largest to the smallest, until one fails. Such a fixed sequence needs no correction for
the number of tests (Marcus, Peritz, Gabriel 1976), and a single test is the exact binomial one (Clopper, Pearson 1934):
the network that is returned agrees with the dense one less often than asked for with a probability of 1 - confidence at
most, for samples drawn as the held-out ones were.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastscore.arguments import check_number
from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch, map_tensors
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.refused_batches import naming_argument
from fastscore.progress import bar
from fastscore.pruning.budgets.costs import Costs
from fastscore.pruning.budgets.finer_steps import in_place_of_last
from fastscore.pruning.budgets.selection import MacsLeft, channels_of, restore
from fastscore.pruning.options import Budgets
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.report import Judged
from fastscore.pruning.result import PruneResult
from fastscore.recovery.calibration import HELD_OUT
from fastscore.recovery.decisions import Decisions, JudgedOutputs
from fastscore.recovery.divergence import Divergence, divergence, figures, least_share
from fastscore.recovery.held_out import Part, samples_in
from fastscore.wording import counted

_CONFIDENCE = 0.95  # by which samples that judge are few, where none is asked for
_BIT = 8  # of a sample's id, by which the samples to judge by are halved
LARGER = (0.25, 0.5, 0.75)  # of what the largest network that passed lost: networks that are tested before it
TOLERANCE = 0.005  # of the MACs: candidates nearer to each other are not told apart


@dataclass(frozen=True)
class Quality:
    """What is asked of the smaller network's outputs.

    Args:
        agreement: the least share of samples on which it decides as the dense network does; of outputs that are judged
            by their error, the least R².
        kl: the largest mean KL divergence from the dense network, in nats, or squared error.
        confidence: of the statement that the agreement holds beyond the samples that judge; None: it holds on those.

    Raises:
        ValueError: a number out of its range, or a confidence of a KL divergence, for which there is no exact bound.
        TypeError: no number.
    """

    agreement: float | None = None
    kl: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                check_number(name, value, "0.98" if name != "kl" else "0.01")
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise ValueError(f"agreement: {self.agreement} is outside (0, 1); it is the share of samples on which both "
                             "networks decide alike, such as 0.98")
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise ValueError(f"kl: {self.kl}; it must be above 0")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"confidence: {self.confidence} is outside (0, 1)")
        if self.confidence is not None and (self.agreement is None or self.kl is not None):
            raise ValueError("confidence: the bound is one of the agreement: give agreement=, without kl=")

    @property
    def given(self) -> bool:
        """Whether anything is asked for."""
        return self.agreement is not None or self.kl is not None

    def alone(self, budgets: Budgets, calibration: object) -> Budgets:
        """The budgets that channels are ranked for. Raises ValueError where there is none of either kind, or both, or
        nothing to judge by."""
        if not self.given:
            return budgets.require_one("prune", "; or, with calibration=batches, agreement= or kl=")
        if budgets.given:
            raise ValueError(f"agreement, kl: they are budgets of their own, which leave as little as will do: leave "
                             f"{next(iter(budgets.given))}= out, or them")
        if calibration is None:
            raise ValueError("agreement, kl: they are judged on samples: give calibration=batches")
        return Budgets(macs=1.0)

    def bound(self, found: Divergence) -> float:
        """What is held against `agreement`: the share found, or the least that it says of others."""
        if self.confidence is None:
            return found.agreement
        return least_share(round(found.agreement * found.decisions), found.decisions, self.confidence)

    def holds(self, found: Divergence) -> bool:
        """Whether what was found is enough."""
        return (self.agreement is None or self.bound(found) >= self.agreement) and \
            (self.kl is None or found.kl <= self.kl)

    def few(self, judged: Iterable[Judged]) -> str:
        """What is said where so few samples judged that they could not show the agreement of others even if all had
        agreed; empty elsewhere."""
        rows = [row for row in judged if row.decisions and row.mixed != "error"]
        if self.agreement is None or self.confidence is not None or not rows:
            return ""
        row = next((row for row in rows if row.chosen), rows[-1])
        needed = samples_needed(self.agreement, _CONFIDENCE)
        if row.samples >= needed:
            return ""
        more = f"{2 * needed:,} held_out, or {2 * HELD_OUT * needed:,} calibration samples (one of {HELD_OUT} judges)"
        made = counted(row.decisions, "decision")
        if row.samples != row.decisions:  # those about one sample are no independent trials
            return (f"judged by {made} about {counted(row.samples, 'sample')} alone: more held_out or calibration "
                    f"samples say more of others, such as {more}")
        agreed = round(row.agreement * row.decisions)
        shown = (f"{agreed:,} of {made} agree, which even of a network that was not chosen by them would only show "
                 f"that at least {least_share(agreed, row.decisions, _CONFIDENCE):.1%} of others do "
                 f"({100 * _CONFIDENCE:.0f} % confidence)")
        if row.decisions * (1 - self.agreement) < 1 - 1e-9:  # all have to be alike
            most = f" or {1 - 1 / row.decisions:.1%} at most" if row.decisions > 1 else ""
            shown += f"; of {made} it is 100%{most}, so {self.agreement:g} lets none differ"
        bound = f"confidence={_CONFIDENCE:g} (--confidence {_CONFIDENCE:g})"
        return f"{shown}: {bound} holds it beyond them, and takes {more}"


def samples_needed(agreement: float, confidence: float) -> int:
    """So many samples, all alike, are enough."""
    return math.ceil(math.log(1 - confidence) / math.log(agreement) - 1e-9)


def search(macs: MacsLeft, passes: Callable[[int], bool], tolerance: float = TOLERANCE, start: int = 0) -> list[int]:
    """The numbers of steps that were tried, by bisection in MACs; the largest that passed is the one to take.

    It ends where the next step up from that one fails, or is a network smaller by less than `tolerance`, a share of
    macs[0]. macs: what remains after 0, 1, 2, ... steps of the removal order; after `start` steps, it passes untried.
    """
    low, high, tried = start, len(macs), list[int]()
    while high - low > 1 and macs[low] - macs[least := min(high, len(macs) - 1)] > tolerance * macs[0]:
        steps = min(macs.steps_to((macs[low] + macs[least]) / 2, low, least), high - 1)
        tried.append(steps)
        low, high = (steps, high) if passes(steps) else (low, steps)
    return tried


Way: TypeAlias = tuple[MacsLeft, Callable[[int], PruneResult]]


class Judge:
    """Compares smaller networks with the dense one, in evaluation mode, whose outputs are kept, on batches in a fixed
    order. Raises ValueError where those have no sample, or the dense network
    cannot run on one, FloatingPointError for outputs that are not finite."""

    def __init__(self, dense: nn.Module, batches: Iterable[Batch], forward: Forward,
                 outputs: JudgedOutputs = None) -> None:
        self._device, self.judging, self._batches = device_of(dense), Decisions(forward, outputs), batches
        self._found: Divergence | None = None
        self.samples = sum(samples_in(batch, "held_out") for batch in batches)
        if not self.samples:
            raise ValueError(f"held_out: there is no sample to judge by; give more batches (one of {HELD_OUT} samples "
                             "judges), or held_out= batches")
        said = f"{getattr(batches, 'name', '') or 'held_out'}: the model cannot take its batches"
        self._outputs = [{name: each.cpu() for name, each in outputs.items()} for outputs in self._of(dense, said)]
        divergence(self._outputs, self._outputs, errors=self.judging.errors)  # before hours of work, not after

    def __call__(self, model: nn.Module) -> Divergence:
        """How far `model` is from the dense network."""
        self._found = divergence(self._outputs, self._of(evaluation_copy(model)), errors=self.judging.errors)
        return self._found

    @property
    def decided(self) -> str:
        """What was taken for decisions, and what is to be known of them."""
        return str(self.judging) + (self._found.one_sided if self._found else "")

    def _of(self, network: nn.Module, said: str = "") -> Iterator[dict[str, Tensor]]:
        """said: how errors of its code begin; they come through as they are where that is empty."""
        with torch.no_grad():
            for batch in self._batches:
                batch = map_tensors(lambda tensor: tensor.to(self._device), batch)
                with naming_argument(said, network, self.judging, batch) if said else nullcontext():
                    found = self.judging(network, batch)
                yield found


def choose_steps(macs: MacsLeft, quality: Quality, find: Callable[[int], Divergence],
                 test: Callable[[int], Divergence], tolerance: float = TOLERANCE, start: int = 0
                 ) -> tuple[int, dict[int, Divergence]]:
    """(steps to take, steps that were tried -> what decided about them); macs, tolerance, start: see `search`.

    find: steps -> how far the network is from the dense one on the samples that bisection goes by. test: the same on
    samples that it does not see; asked only with a confidence.
    """
    rows: dict[int, Divergence] = {}

    def passes(steps: int) -> bool:
        rows[steps] = find(steps)
        return quality.holds(rows[steps])

    passed = {steps for steps in search(macs, passes, tolerance, start) if quality.holds(rows[steps])}
    if passed and quality.confidence is not None:  # bisection soon tries near neighbours alone, which fail together
        gone = macs[0] - macs[min(passed)]
        passed |= {macs.steps_to(macs[0] - part * gone, 0, min(passed)) for part in LARGER}
    best = start
    for steps in sorted(passed):
        if quality.confidence is not None:
            rows[steps] = test(steps)
            if not quality.holds(rows[steps]):
                break
        best = steps
    return best, rows


def finer_than_next(order: Sequence[RemovalStep], best: int, macs: MacsLeft,
                    along: Callable[[list[RemovalStep]], MacsLeft]) -> list[RemovalStep] | None:
    """The first `best` steps of an order, and those that go in the place of the next, which is a large one, as far as
    they leave more than it does; None where it is small, or there are none.

    macs: what remains along the order; along: of another.
    """
    if best + 1 >= len(macs) or macs[best] - macs[best + 1] <= TOLERANCE * macs[0]:
        return None
    other = in_place_of_last(order, best + 1)
    left = along(other)
    return other[:most] if (most := left.steps_to(macs[best + 1], best, len(left)) - 1) > best else None


def build_after(steps: Sequence[RemovalStep], costs: Costs,
                build: Callable[[Mapping[str, Tensor]], PruneResult]) -> PruneResult:
    """What `build` makes of the channels that go in `steps`, while they are gone from `costs`."""
    for step in steps:
        step.remove(costs)
    try:
        return build(channels_of(steps))
    finally:
        restore(steps, costs)


def select_by_quality(macs: MacsLeft, build: Callable[[int], PruneResult], quality: Quality, dense: nn.Module,
                      held_out: Iterable[Batch], forward: Forward, outputs: JudgedOutputs = None,
                      tolerance: float = TOLERANCE, finer: Callable[[int], Way | None] | None = None
                      ) -> tuple[PruneResult, tuple[Judged, ...]]:
    """(the smallest network that holds, all that were judged, from the largest to the smallest).

    macs, tolerance: see `search`. build: makes the repaired network after so many steps. dense, held_out, outputs: see
    `Judge`. finer: the steps to take -> `macs` and `build` of an order that begins with them, of which more may be
    taken; None where there is none. Not asked with a confidence, which one fixed sequence of tests has. Raises
    ValueError for too few samples for the confidence, and outputs with several decisions about a sample, which are no
    independent trials.
    """
    halves = [held_out] if quality.confidence is None else [Part(held_out, 2, judges, _BIT) for judges in (True, False)]
    judges = [Judge(dense, half, forward, outputs) for half in halves]
    needed = 1 if quality.confidence is None or quality.agreement is None else \
        samples_needed(quality.agreement, quality.confidence)
    if (fewest := min(judge.samples for judge in judges)) < needed:
        raise ValueError(f"held_out: half of the samples to judge by are {fewest}, and agreement={quality.agreement} "
                         f"with confidence={quality.confidence} takes {needed}: give more held_out "
                         f"or calibration samples (about {2 * needed:,} held_out, or {2 * HELD_OUT * needed:,} "
                         f"calibration, of which one of {HELD_OUT} judges), or ask for less")
    built: dict[int, PruneResult] = {}
    remains: dict[int, float] = {}  # of the MACs, as they are counted then

    def judge(build: Callable[[int], PruneResult], judge: Judge, steps: int) -> Divergence:
        if steps not in built:
            built[steps] = build(steps)
            dense_macs, left = built[steps].report.macs
            remains[steps] = left / dense_macs
        found = judge(built[steps].model)
        tried.set_postfix_str(f"{remains[steps]:.1%} of the MACs: "
                              f"{figures(found.agreement, found.kl, found.by_error, found.mixed)}")
        tried.update()
        if quality.confidence is not None and any(each.decisions != judge.samples
                                                  for each in found.outputs.values() or (found,)):
            if judge.judging.errors:
                raise ValueError(f"confidence: {judge.judging}: that is no share of decisions, and no bound holds of "
                                 "it: leave confidence out")
            raise ValueError(f"confidence: the model makes {counted(found.decisions, 'decision')} about "
                             f"{counted(judge.samples, 'sample')}; those about one sample are no independent "
                             "trials, and no bound counts them: leave confidence out")
        if not quality.holds(found):
            built.pop(steps)
        return found

    def along(macs: MacsLeft, build: Callable[[int], PruneResult], start: int) -> tuple[int, list[Judged]]:
        best, rows = choose_steps(macs, quality, partial(judge, build, judges[0]), partial(judge, build, judges[-1]),
                                  tolerance, start)
        return best, [Judged(remains[steps], found.agreement, found.kl, quality.bound(found), found.decisions,
                             steps == best, found.by_error, found.mixed, judges[0].samples)
                      for steps, found in sorted(rows.items())]

    with bar("judging", " networks") as tried:
        best, judged = along(macs, build, 0)
        result = built.get(best)
        other = finer(best) if finer is not None and quality.confidence is None else None
        if other is not None:
            built.clear()
            most, more = along(*other, best)
            if most > best:
                result, judged = built[most], [replace(row, chosen=False) for row in judged]
            judged = sorted([*judged, *more], key=lambda row: -row.macs)
    return result or build(0), tuple(judged)
