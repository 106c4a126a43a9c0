"""A budget in measured time: candidates along the removal order are built and timed beside the dense model.

Which candidates is told by a model of the time: that of each layer in the dense network, growing with its width. What
was measured corrects it, so that a few candidates do.
"""

import bisect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.modules.inspection import device_of
from fastscore.progress import bar
from fastscore.pruning.budgets.clocks import Call, Clock, runner
from fastscore.pruning.budgets.costs import Costs, MacsWithout
from fastscore.pruning.budgets.finer_steps import in_place_of_last
from fastscore.pruning.budgets.layer_times import layer_seconds
from fastscore.pruning.budgets.selection import channels_of, restore, rounded_up, steps_needed, totals_along
from fastscore.pruning.options import Budgets
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.report import UNSTEADY, Candidate, Timing

# The search ends with a candidate whose share of the dense model's time is below the budget by no more than this (or
# than it is uncertain by), or where one that is over it is foreseen to take no more than this share of the dense
# model's time more.
TOLERANCE = 0.02
_ROUNDS, _SECONDS = 9, 0.4  # the least of each for one measurement
_EXTRAPOLATED = 3  # candidates over the budget, after which the smallest network of all is measured
_MANY = 8  # measurements, after which the search comes to an end
_MOST = 5  # times as many seconds, while the share is not known to within TOLERANCE
_LEAST = 2e-3  # seconds of a single reading, which repeats short calls


def time_pair(dense: Call, other: Call, device: torch.device, patience: int = 1) -> Timing:
    """The time of one call of each of two models (see fastscore.pruning.budgets.clocks), which take turns.

    Both run without autograd. They go on for at least 9 rounds and 0.4 seconds, then until the share is known to within
    0.02, or for 2 seconds. device: to wait for. patience: multiplies all of these numbers but 0.02.
    """
    def reading(call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
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


def search_steps(foreseen: Sequence[float], start: int, share: float, measure: Callable[[int, int], float],
                 uncertainty: Callable[[int], float] = lambda steps: 0.0) -> int:
    """How many steps to take for a measured time of at most `share`, as few as can be told.

    foreseen: the time after each number of steps, descending, in any unit. start: the least number of steps.
    measure(steps, patience): the share of the dense model's time that is measured. It is taken to fall with what is
    foreseen, to within noise. The first candidate is the one for which the budget is foreseen; as long as none is below
    the budget, the next one follows from what the last one gained. Then candidates are aimed at the budget along a
    straight line between the nearest two, or halve what lies between them, in turn. What is found is measured again,
    twice as long, and must hold again; otherwise the search goes on. uncertainty(steps): of what was measured last of a
    candidate; where it is above TOLERANCE, so is what the search settles for, since no other candidate could be told
    from this one. After _MANY measurements TOLERANCE doubles with each, too. Raises ValueError, naming what was
    reached, when no candidate holds.
    """
    most, whole = len(foreseen) - 1, foreseen[0]
    slow: dict[int, float] = {0: 1.0}  # steps -> measured share
    fast: dict[int, float] = {}
    confirmed: set[int] = set()
    aim_straight, count = True, 0

    def try_out(steps: int, patience: int = 1) -> None:
        nonlocal count
        count += 1
        measured = measure(steps, patience)
        fast.pop(steps, None)
        (fast if measured <= share else slow)[steps] = measured

    def tolerance() -> float:
        return TOLERANCE * 2.0 ** max(count - _MANY, 0)

    def near(aim: float) -> int:
        return bisect.bisect_left(foreseen, -aim, key=lambda left: -left)

    def beyond(low: int) -> int:
        """A candidate that should be fast, where none is yet."""
        wanted = share - TOLERANCE / 2
        if low == 0:
            return near(whole * wanted)
        if count > _MANY:
            return near(foreseen[low] - whole * tolerance())
        gained = (1 - slow[low]) / (whole - foreseen[low]) if foreseen[low] < whole else 0.0
        if gained <= 0 or len(slow) > _EXTRAPOLATED:
            return most
        return near(foreseen[low] - (slow[low] - wanted) / gained)

    if start:
        try_out(start)
    while True:
        low = max(slow, default=start)
        candidates = [steps for steps in fast if steps > low] if start not in fast else [start]
        if not candidates:
            if most in slow:
                unsteady = f" (± {unsure:.1%}: the clock was unsteady; time on a machine that does nothing else)" \
                    if (unsure := uncertainty(most)) > UNSTEADY else ""
                raise ValueError(f"latency: {share:g} cannot be reached: with every removable channel gone, "
                                 f"{rounded_up(slow[most])} of the dense model's time was measured{unsteady}; ask for "
                                 "more, lower the floor, or ignore fewer layers")
            try_out(min(max(beyond(low), low + 1), most))
            continue
        high = min(candidates)
        least = max(tolerance(), uncertainty(high))
        close = foreseen[low] - foreseen[high] <= least * whole or fast[high] >= share - least
        if close or high in (start, low + 1):
            if high in confirmed:
                return high
            confirmed.add(high)
            try_out(high, 2)
            continue
        aim = (foreseen[low] + foreseen[high]) / 2
        if aim_straight and slow[low] > fast[high]:
            along = (slow[low] - share + TOLERANCE / 2) / (slow[low] - fast[high])
            aim = foreseen[low] + (foreseen[high] - foreseen[low]) * min(max(along, 0.05), 0.95)
        aim_straight = not aim_straight
        try_out(min(max(near(aim), low + 1), high - 1))


def foreseen_times(order: Sequence[RemovalStep], costs: Costs, seconds: Mapping[str, float]) -> list[float]:
    """The layers' time after 0, 1, 2, ... steps, descending, where each layer's grows with its width.

    costs: whole; so again afterwards. seconds: of each of its layers in the dense model.
    """
    whole = {name: layer.width for name, layer in costs.layers.items()}

    def of_group(group: str) -> float:
        layers = {name: costs.layers[name] for name in costs.layers_of(group)}
        return math.fsum(seconds[name] * layer.width / whole[name] for name, layer in layers.items() if layer.present)

    left = [math.fsum(seconds[name] for name in whole)]
    for step in order:
        time = left[-1]
        for group, channels in step.parts:
            time -= of_group(group)
            costs.remove(group, channels)
            time += of_group(group)
        left.append(time)
    restore(order, costs)
    return left


def select_by_latency(order: list[RemovalStep], costs: Costs, budgets: Budgets,
                      build: Callable[[Mapping[str, Tensor]], tuple[nn.Module, int]], dense: nn.Module,
                      example_inputs: Batch, forward: Forward, macs_without: MacsWithout | None,
                      clock: Clock = "torch") -> tuple[dict[str, Tensor], tuple[Candidate, ...]]:
    """Channels to remove (group -> int64 [R]) so that the measured time and the other budgets hold; what was measured.

    order: the first steps of it go, none comes back; but where the last is a branch or an expert and far less than the
    budget remains then, it stays, and steps of channels that follow go in its place, if they reach the budget. build:
    makes the model without such channels, and counts its MACs. costs: whole; left as they are without the channels.
    macs_without: counts what remains, see steps_needed. clock: what runs the models. Raises ValueError where a budget
    is out of reach.
    """
    share = 1.0 if budgets.latency is None else budgets.latency
    start = steps_needed(order, costs, budgets.counted, macs_without)
    restore(order[:start], costs)
    taken: Sequence[RemovalStep] = order[:start]
    rows = list[Candidate]()
    if share < 1.0:
        seconds = layer_seconds(dense, costs.layers, example_inputs, forward)
        whole, device = runner(clock, dense, example_inputs, forward), device_of(dense)
        with bar("timing", " candidates") as told:

            def along(order: Sequence[RemovalStep], foreseen: Sequence[float], start: int
                      ) -> tuple[Sequence[RemovalStep], list[Candidate]]:
                """The steps of an order to take, and what was measured."""
                measured: dict[int, Timing] = {}
                counted: dict[int, int] = {}
                built: dict[int, Call] = {}

                def measure(steps: int, patience: int) -> float:
                    if steps not in built:
                        built.clear()
                        other, counted[steps] = build(channels_of(order[:steps]))
                        built[steps] = runner(clock, other.eval(), example_inputs, forward)
                    measured[steps] = replace(time_pair(whole, built[steps], device, patience), clock=clock)
                    told.set_postfix_str(f"{measured[steps].share:.1%} of the time for {share:.1%}")
                    told.update()
                    return measured[steps].share

                steps = search_steps(foreseen, start, share, measure, lambda steps: measured[steps].uncertainty)
                left = totals_along(order, costs)
                return order[:steps], [Candidate(left[count]["channels"] / costs.dense["channels"],
                                                 left[count]["params"] / costs.dense["params"],
                                                 counted[count] / costs.dense["macs"], timing, count == steps)
                                       for count, timing in sorted(measured.items())]

            foreseen = foreseen_times(order, costs, seconds)
            taken, rows = along(order, foreseen, start)
            below = share - next((row.timing.share for row in rows if row.chosen), share)
            if len(taken) > start and taken[-1].whole and below > TOLERANCE:
                finer = in_place_of_last(order, len(taken))
                times = foreseen_times(finer, costs, seconds)
                most = sum(time > foreseen[len(taken)] for time in times) - 1  # so many steps leave more than it does
                if most >= len(taken):
                    with suppress(ValueError):  # they do not reach the budget
                        taken, others = along(finer[:most], times[:most + 1], len(taken) - 1)
                        rows = [*(replace(row, chosen=False) for row in rows), *others]
    for step in taken:
        step.remove(costs)
    return channels_of(taken), tuple(rows)


def say_slower(candidates: Sequence[Candidate]) -> str:
    """A note on smaller models that took longer than the dense one, by more than that is uncertain by; else empty."""
    slower = [one.timing for one in candidates if one.timing.share > 1 + max(one.timing.uncertainty, TOLERANCE)]
    return f"{len(slower)} of {len(candidates)} smaller models that were timed took longer than the dense one (up to " \
           f"{max(timing.share for timing in slower):.0%} of its time): {slower[0].clock} is slow at such widths; " \
           "round_to=\"auto\" or 8 leaves others, and more channels" if slower else ""
