"""Which channels go: the first steps of the order that a budget asks for. No model is touched here."""

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import Batch, few_samples, first_tensor
from fastscore.graph import cache, scored_units
from fastscore.graph.groups import ChannelGraph, Ignore, check_numbers
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs, MacsWithout, Resource
from fastscore.pruning.budgets.finer_steps import over, with_finer_steps
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.scoring.scores import Scores
from fastscore.wording import counted

RECOUNTS = 64  # trial cuts by which a budget on MACs is met where sums over channels do not foresee them


def scored_graph(model: nn.Module, scores: Scores, example_inputs: Batch, forward: Forward,
                 ignore: Ignore) -> ChannelGraph:
    """The groups of `model` that have scores and are not ignored. Raises TypeError for what are no scores, ValueError
    for those of another model, FloatingPointError, naming it, for NaN in a layer of theirs."""
    check_kind(scores)
    whole = _traced_as_scored(model, scores, example_inputs, forward)
    graph = whole.without(model, ignore)
    scored = tuple(group for group in graph.groups if group.name in scores)
    unscored = {group.name: scores.skipped.get(group.name, "no score") for group in graph.groups
                if group.name not in scores}
    graph = replace(graph, groups=scored, skipped={**graph.skipped, **unscored})
    check_numbers(model, graph.groups)
    return graph


def _traced_as_scored(model: nn.Module, scores: Scores, example_inputs: Batch, forward: Forward) -> ChannelGraph:
    """The graph of `model` that the scores are of: traced with the example; or with its first sample, as score() does,
    where code that folds channels into samples can be followed with one alone."""
    units, first = scores.origin.units, first_tensor(example_inputs)

    def traced(example: Batch, samples: Batch | None) -> ChannelGraph:
        graph = scored_units.of_graph(model, trace(model, example, forward, samples, units), units)
        check_scores(graph, scores)
        return graph

    try:
        return traced(example_inputs, None)
    except ValueError:
        if forward is call_model and first is not None and first.dim() and len(first) > 1:
            cache.forget(model)
            with suppress(ValueError):
                return traced(few_samples(example_inputs, 1), example_inputs)
        raise  # the first error, with its cause


def check_kind(scores: object) -> None:
    """Raise TypeError for what are no scores."""
    if not isinstance(scores, Scores):
        raise TypeError(f"scores: {type(scores).__name__}; give what fastscore.score returned")


def check_removable(scores: Scores) -> None:
    """Raise ValueError for scores of channels that no surgery can take out, TypeError for what are none."""
    check_kind(scores)
    if scores.origin.units == "norms":
        raise ValueError('scores: they are of single BatchNorms (units="norms"), whose channels can be masked but not '
                         'removed: to prune, score with units="groups"')


def check_scores(graph: ChannelGraph, scores: Scores) -> None:
    """Raise ValueError, naming the layer, where `scores` are not those of the model that `graph` was traced from."""
    widths = {group.name: group.channels for group in graph.groups}
    for layer in scores:
        if layer not in widths and layer in graph.skipped:
            raise ValueError(f"scores: they know channels of {layer}, which cannot go from this model on these "
                             f"example_inputs: {graph.skipped[layer]}")
        if layer not in widths:
            parts = (name[:-len(layer) - 1] for name in widths if name.endswith(f".{layer}"))
            within = next((part for part in parts if all(
                widths.get(f"{part}.{name}") == len(values) for name, values in scores.items())), "")
            way_out = f"give its .{within}, or score this model" if within else "score this model"
            raise ValueError(f"scores: they belong to another model, which has a prunable layer {layer}; this one has "
                             f"none of that name: {way_out}")
        if len(scores[layer]) != widths[layer]:
            raise ValueError(f"scores: {layer} has {counted(widths[layer], 'channel')} and the scores know "
                             f"{len(scores[layer])}; the model was changed since (pruned?): score it again")
    if scores.origin.fingerprint != graph.fingerprint:
        raise ValueError("scores: they belong to a model whose layers are connected differently; score this model, or "
                         "give example_inputs with as many samples as a batch that was scored")


class MacsLeft:
    """MACs that remain after 0, 1, 2, ... steps of a removal order, each counted when it is first asked for.

    foreseen: what is expected there; it says where to look. count: steps -> what remains in truth; less with more
    steps. sums_hold: whether what was foreseen has been true so far: where it is true of a number of steps, too, it is
    believed of one step less.
    """

    def __init__(self, foreseen: Sequence[float], count: Callable[[int], float], sums_hold: bool = False) -> None:
        self._foreseen, self._count, self._sums_hold = foreseen, count, sums_hold
        self._counted: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._foreseen)

    def __getitem__(self, steps: int) -> float:
        if not 0 <= steps < len(self):
            raise IndexError(steps)
        if steps not in self._counted:
            self._counted[steps] = self._count(steps)
        return self._counted[steps]

    def steps_to(self, limit: float, low: int, high: int) -> int:
        """The fewest steps after which at most `limit` remains: more than `low`, after which more does, and no more
        than `high`, after which no more does, or which is one step more than there are."""
        off, tried = 0.0, 0
        while high - low > 1:
            guess = bisect.bisect_left(self._foreseen, off - limit, key=lambda macs: -macs)
            if tried % 3 == 2:
                guess = (low + high) // 2
            guess = min(max(guess, low + 1), high - 1)
            tried += 1
            off = self[guess] - self._foreseen[guess]
            low, high = (low, guess) if self[guess] <= limit else (guess, high)
            if high == guess and self.is_foreseen(guess) and self._sums_hold and self._foreseen[guess - 1] > limit:
                break
        return high

    def is_foreseen(self, steps: int) -> bool:
        """Whether what was foreseen after so many steps is what is counted."""
        return abs(self[steps] - self._foreseen[steps]) <= max(0.5, 1e-9 * self._foreseen[0])


def steps_needed(steps: list[RemovalStep], costs: Costs, budgets: Mapping[Resource, float],
                 macs_without: MacsWithout | None = None) -> int:
    """How many of `steps`, in order, must go for every budget to hold; they are gone from `costs` afterwards.

    budgets: what may remain, as a share of the dense cost. macs_without: counts the MACs that remain; a budget on MACs
    holds for what it counts, and costs.totals is that afterwards. Raises ValueError, naming what can be reached, when
    all of them are not enough.
    """
    if macs_without is None or "macs" not in budgets:
        return _foreseen_steps(steps, costs, budgets)
    others: dict[Resource, float] = {unit: share for unit, share in budgets.items() if unit != "macs"}
    least = _foreseen_steps(steps, costs, others)
    restore(steps[:least], costs)
    left = macs_along(steps, costs, macs_without)
    high = left.steps_to(budgets["macs"] * costs.dense["macs"] * (1 + 1e-12), least - 1, len(left))
    if high > len(steps):
        raise OutOfReachError("macs", budgets["macs"], left[len(steps)] / costs.dense["macs"])
    for step in steps[:high]:
        step.remove(costs)
    costs.totals["macs"] = left[high]
    return high


def macs_along(steps: Sequence[RemovalStep], costs: Costs, macs_without: MacsWithout) -> MacsLeft:
    """What remains along `steps`; `costs`, whole, are so again afterwards."""
    foreseen = [left["macs"] for left in totals_along(steps, costs)]
    return MacsLeft(foreseen, lambda count: macs_without(channels_of(steps[:count])), costs.sums_hold)


def totals_along(steps: Sequence[RemovalStep], costs: Costs) -> list[dict[Resource, float]]:
    """What the costs sum up to after 0, 1, 2, ... `steps`; `costs`, whole, are so again afterwards."""
    left = [dict(costs.totals)]
    for step in steps:
        step.remove(costs)
        left.append(dict(costs.totals))
    restore(steps, costs)
    return left


def _foreseen_steps(steps: list[RemovalStep], costs: Costs, budgets: Mapping[Resource, float]) -> int:
    count = 0
    while exceeded := over(costs, budgets):
        if count == len(steps):
            unit = exceeded[0]
            remains = costs.totals[unit] / costs.dense[unit]
            restore(steps, costs)
            raise OutOfReachError(unit, budgets[unit], remains)
        steps[count].remove(costs)
        count += 1
    return count


class OutOfReachError(ValueError):
    """A budget that no choice of channels keeps; `least` is the share that remains of it without all of them."""

    def __init__(self, unit: Resource, share: float, least: float) -> None:
        super().__init__(f"{unit}: {share:g} cannot be reached: with every removable channel gone, {rounded_up(least)} "
                         f"of the {unit} remain; ask for more, lower the floor or round_to, or ignore fewer layers")
        self.unit, self.share, self.least = unit, share, least

    def __reduce__(self) -> tuple[type["OutOfReachError"], tuple[Resource, float, float], dict[str, Any]]:
        return OutOfReachError, (self.unit, self.share, self.least), {"args": self.args}  # others add to what it says


def rounded_up(share: float) -> str:
    """A share in four digits, and not less than it: whoever asks for that much gets it."""
    step = 10.0 ** (math.floor(math.log10(share)) - 3) if share > 0 else 1.0
    return f"{math.ceil(share / step - 1e-9) * step:.4g}"


def restore(steps: Sequence[RemovalStep], costs: Costs) -> None:
    """Give back the channels of `steps`, the last that went."""
    for group, channels in _by_group(steps).items():
        costs.restore(group, channels)
    if costs.totals["channels"] == costs.dense["channels"]:
        costs.totals.update(costs.dense)  # without the rounding of sums and differences


def give_back(removed: Mapping[str, Tensor], costs: Costs) -> None:
    """Give back all that is gone from `costs`: group -> int64 [R]."""
    for group, channels in removed.items():
        costs.restore(group, channels.tolist())
    costs.totals.update(costs.dense)  # without the rounding of sums and differences


def select(steps: list[RemovalStep], costs: Costs, budgets: Mapping[Resource, float],
           macs_without: MacsWithout | None = None) -> dict[str, Tensor]:
    """Channels to remove so that every budget holds: group -> int64 [R], ascending; they are gone from `costs`.

    Steps go in order until it holds (see steps_needed), but for coarse ones that finer ones stand in for; then the most
    important of the removed come back as long as it still does, so what remains is below the budget by less than any
    one of them.
    """
    first = steps[:steps_needed(steps, costs, budgets, macs_without)]
    reached = costs.totals["macs"]
    taken = with_finer_steps(steps, len(first), costs, budgets)
    if macs_without is None or "macs" not in budgets:
        return channels_of(_give_back(taken, costs, budgets))
    if taken != first:
        costs.totals["macs"] = _counted(taken, costs, macs_without)
        if over(costs, budgets) or costs.totals["macs"] < reached:  # the finer ones were foreseen to be others
            restore(taken, costs)
            for step in first:
                step.remove(costs)
            costs.totals["macs"], taken = reached, first
    reached, foreseen = costs.totals["macs"], _are_foreseen(taken, costs)
    gone = _give_back(taken, costs, budgets)
    if len(gone) < len(taken):
        costs.totals["macs"] = _counted(gone, costs, macs_without)
        if over(costs, budgets):
            for step in taken:
                if step not in gone:
                    step.remove(costs)
            costs.totals["macs"], gone, foreseen = reached, dict.fromkeys(taken), False
    if not foreseen:  # again, each with a count of its own
        gone = _give_back([step for step in taken if step in gone], costs, budgets, macs_without)
    return channels_of(gone)


def _counted(gone: Iterable[RemovalStep], costs: Costs, macs_without: MacsWithout) -> int:
    """MACs without `gone`, which `costs` are without, too; where what is left does not run, they are whole again."""
    removed = channels_of(gone)
    try:
        return macs_without(removed)
    except RuntimeError:
        give_back(removed, costs)
        raise


def _are_foreseen(taken: Sequence[RemovalStep], costs: Costs) -> bool:
    """Whether the MACs that `costs` now tell, which were counted, are those that its sums say."""
    counted, gone = costs.totals["macs"], _by_group(taken)
    for group, channels in gone.items():
        costs.restore(group, channels)
    foreseen = costs.tells(costs.dense["macs"], costs.totals["macs"])
    for group, channels in gone.items():
        costs.remove(group, channels)
    costs.totals["macs"] = counted
    return foreseen


def _give_back(taken: Sequence[RemovalStep], costs: Costs, budgets: Mapping[Resource, float],
               macs_without: MacsWithout | None = None) -> dict[RemovalStep, None]:
    """Those of `taken` that stay away. With macs_without, the MACs of each that may come back are counted; after
    RECOUNTS of them those that are foreseen not to fit stay away uncounted, and after twice as many all do."""
    stuck: set[str] = set()  # groups whose last step does not fit: those before it are not to come back out of order
    gone = dict.fromkeys(taken)
    counts = 0
    for step in reversed(taken):
        if not stuck.isdisjoint(step.groups):
            continue
        before = costs.totals["macs"]
        step.restore(costs)
        del gone[step]
        if macs_without is not None and counts < (RECOUNTS if over(costs, budgets) else 2 * RECOUNTS):
            try:
                costs.totals["macs"] = macs_without(channels_of(gone))
            except RuntimeError:  # of what is left then, which does not run
                costs.totals["macs"] = math.inf
            counts += 1
        elif macs_without is not None:
            costs.totals["macs"] = math.inf
        if over(costs, budgets):
            step.remove(costs)
            costs.totals["macs"] = before
            stuck.update(step.groups)
            gone[step] = None
    return gone


def channels_of(steps: Iterable[RemovalStep]) -> dict[str, Tensor]:
    """All that `steps` take: group -> int64 [R], ascending."""
    return {group: torch.tensor(sorted(channels)) for group, channels in _by_group(steps).items()}


def _by_group(steps: Iterable[RemovalStep]) -> dict[str, list[int]]:
    removed: dict[str, list[int]] = defaultdict(list)
    for step in steps:
        for group, channels in step.parts:
            removed[group] += channels
    return removed
