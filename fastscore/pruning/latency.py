"""A budget in measured time: candidates along the removal order are built and timed beside the dense model."""

import bisect
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward
from fastscore.modules.inspection import device_of
from fastscore.pruning.costs import Costs, MacsWithout
from fastscore.pruning.options import Budgets
from fastscore.pruning.ranking import RemovalStep
from fastscore.pruning.report import Candidate, Timing
from fastscore.pruning.selection import channels_of, restore, rounded_up, steps_needed

# The search ends with a candidate whose share of the dense model's time is below the budget by no more than this, or
# whose neighbour in the removal order is over it.
TOLERANCE = 0.02
_ROUNDS, _SECONDS = 9, 0.4  # the least of each for one measurement
_MOST = 5  # times as many seconds, while the share is not known to within TOLERANCE
_LEAST = 2e-3  # seconds of a single reading, which repeats short calls


def time_pair(dense: nn.Module, other: nn.Module, example_inputs: Batch, forward: Forward,
                 patience: int = 1) -> Timing:
    """The time of one call of each of two models, which take turns, on their device as it is now.

    Both run as they are (in evaluation mode, say), without autograd. They go on for at least 9 rounds and 0.4 seconds,
    then until the share is known to within 0.02, or for 2 seconds. patience: multiplies all of these numbers but 0.02.
    """
    device = device_of(dense)

    def reading(model: nn.Module, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            forward(model, example_inputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / calls

    with torch.no_grad():
        models = (dense, other)
        for model in models:
            reading(model, 2)  # whatever the first calls set up
        calls = [max(1, round(_LEAST / max(reading(model, 1), 1e-7))) for model in models]
        rows: list[tuple[float, float]] = []
        start = time.perf_counter()
        while True:
            pair = [0.0, 0.0]
            for which in ((0, 1), (1, 0))[len(rows) % 2]:  # neither always comes first
                pair[which] = reading(models[which], calls[which])
            rows.append((pair[0], pair[1]))
            seconds = (time.perf_counter() - start) / patience
            if len(rows) < _ROUNDS * patience or seconds < _SECONDS:
                continue
            low, _, high = statistics.quantiles([row[1] / row[0] for row in rows], n=4)
            uncertainty = 1.57 * (high - low) / len(rows) ** 0.5  # of a median, 95 %: McGill et al. 1978
            if uncertainty <= TOLERANCE or seconds > _MOST * _SECONDS:
                break
    return Timing((statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows)), uncertainty)


def search_steps(macs: list[float], start: int, share: float, measure: Callable[[int, int], float]) -> int:
    """How many steps to take for a measured time of at most `share`, as few as can be told.

    macs: what remains after each number of steps, descending. start: the least number. measure(steps, patience): the
    share of the dense model's time that is measured. Time is taken to fall with MACs, to within noise: the search
    halves the MACs in question or aims at the budget along a straight line, in turn. What it finds is measured again,
    twice as long, and must hold again; otherwise it goes on. Raises ValueError, naming what was reached, when no
    candidate holds.
    """
    most = len(macs) - 1
    slow: dict[int, float] = {0: 1.0}  # steps -> measured share
    fast: dict[int, float] = {}
    confirmed: set[int] = set()

    def try_out(steps: int, patience: int = 1) -> None:
        measured = measure(steps, patience)
        fast.pop(steps, None)
        (fast if measured <= share else slow)[steps] = measured

    if start:
        try_out(start)
    if start not in fast and most > start:
        try_out(most)
    aim_straight = True
    while True:
        low = max(slow, default=start)
        candidates = [steps for steps in fast if steps > low] if start not in fast else [start]
        if not candidates:
            if most not in slow:
                try_out(most)
                continue
            raise ValueError(f"latency: {share:g} cannot be reached: with every removable channel gone, "
                             f"{rounded_up(slow[most])} of the dense model's time was measured; ask for more, lower "
                             "the floor, or ignore fewer layers")
        high = min(candidates)
        if high in (start, low + 1) or fast[high] >= share - TOLERANCE:
            if high in confirmed:
                return high
            confirmed.add(high)
            try_out(high, 2)
            continue
        aim = (macs[low] + macs[high]) / 2
        if aim_straight and slow[low] > fast[high]:
            along = (slow[low] - share + TOLERANCE / 2) / (slow[low] - fast[high])
            aim = macs[low] + (macs[high] - macs[low]) * min(max(along, 0.05), 0.95)
        aim_straight = not aim_straight
        try_out(min(max(bisect.bisect_left(macs, -aim, key=lambda left: -left), low + 1), high - 1))


def select_by_latency(order: list[RemovalStep], costs: Costs, budgets: Budgets,
                      build: Callable[[Mapping[str, Tensor]], tuple[nn.Module, int]], dense: nn.Module,
                      example_inputs: Batch, forward: Forward,
                      macs_without: MacsWithout | None) -> tuple[dict[str, Tensor], tuple[Candidate, ...]]:
    """Channels to remove (group -> int64 [R]) so that the measured time and the other budgets hold; what was measured.

    order: the first steps of it go, none comes back. build: makes the model without such channels, and counts its
    MACs. costs: whole; left as they are without the channels. macs_without: counts what remains, see steps_needed.
    Raises ValueError where a budget is out of reach.
    """
    share = 1.0 if budgets.latency is None else budgets.latency
    start = steps_needed(order, costs, budgets.counted, macs_without)
    restore(order[:start], costs)
    left = [dict(costs.totals)]
    for step in order:
        costs.remove(step.group, step.channels)
        left.append(dict(costs.totals))
    restore(order, costs)
    measured: dict[int, Timing] = {}
    counted: dict[int, int] = {}

    def measure(steps: int, patience: int) -> float:
        other, counted[steps] = build(channels_of(order[:steps]))
        measured[steps] = time_pair(dense, other.eval(), example_inputs, forward, patience)
        return measured[steps].share

    steps = start if share == 1.0 else search_steps([row["macs"] for row in left], start, share, measure)
    for step in order[:steps]:
        costs.remove(step.group, step.channels)
    shares = [{unit: row[unit] / costs.dense[unit] for unit in costs.dense} for row in left]
    return channels_of(order[:steps]), tuple(
        Candidate(shares[count]["channels"], shares[count]["params"], counted[count] / costs.dense["macs"], timing,
                  count == steps)
        for count, timing in sorted(measured.items()))
