"""Which channels go: scores and a budget in, channels to keep out. No model is touched here."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastscore.costs import Costs, Unit
from fastscore.groups import ChannelGraph, ChannelGroup
from fastscore.scores import Scores

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Step:
    """Channels of one group that go at once, and the value by which steps are ordered."""

    group: str
    channels: tuple[int, ...]
    value: float


def check_scores(graph: ChannelGraph, scores: Scores) -> None:
    """Raise ValueError, naming the layer, where `scores` are not those of the model that `graph` was traced from."""
    widths = {group.name: group.channels for group in graph.groups}
    for layer in scores:
        if layer not in widths:
            raise ValueError(f"scores: they belong to another model, which has a prunable layer {layer}; this one has "
                             "none of that name: score this model")
        if len(scores[layer]) != widths[layer]:
            raise ValueError(f"scores: {layer} has {widths[layer]} channels and the scores know {len(scores[layer])}; "
                             "the model was changed since (pruned?): score it again")
    if scores.origin.fingerprint != graph.fingerprint:
        raise ValueError("scores: they belong to a model whose layers are connected differently; score this model")


def removal_order(groups: tuple[ChannelGroup, ...], scores: Scores, scope: Scope = "global", round_to: int = 1,
                  floor: float = 0.0) -> list[Step]:
    """The steps in which channels go, least important first; ties in order of group and channel.

    scope: "global" compares importances across groups, "layer" their rank within each group, so that all groups shrink
    alike. round_to: widths that remain are multiples of it (where a group is wide enough). floor: the share of each
    group's channels that stays whatever the budget; at least one channel stays always.
    """
    steps = [step for group in groups if group.name in scores
             for step in _group_steps(group, scores[group.name].double(), scope, round_to, floor)]
    return sorted(steps, key=lambda step: step.value)  # stable: ties keep the order of groups and channels


def _group_steps(group: ChannelGroup, values: Tensor, scope: Scope, round_to: int, floor: float) -> list[Step]:
    units = defaultdict(list)
    for channel, unit in enumerate(group.unit.tolist()):
        units[unit].append(channel)
    order = sorted(units.values(), key=lambda channels: float(values[channels].mean()))
    least = max(1, math.ceil(floor * group.channels - 1e-9))
    steps: list[Step] = []
    pending: list[int] = []
    kept, removed_before = group.channels, 0
    for channels in order:
        pending += channels
        kept -= len(channels)
        if kept < least:
            break
        if kept % round_to == 0:
            value = removed_before / group.channels if scope == "layer" else float(values[pending].mean())
            # a step cannot go before the one below it in its own group
            steps.append(Step(group.name, tuple(pending), max(value, steps[-1].value) if steps else value))
            removed_before += len(pending)
            pending = []
    return steps


def select(steps: list[Step], costs: Costs, budgets: Mapping[Unit, float]) -> dict[str, Tensor]:
    """Channels to remove so that every budget holds: group -> int64 [R], ascending.

    budgets: what may remain, as a share of the dense cost. Steps go in order until it holds; then the most important of
    the removed come back as long as it still does, so what remains is below the budget by less than any one of them.
    Raises ValueError, naming what can be reached, when removing every step is not enough.
    """
    allowed = {unit: share * costs.dense[unit] * (1 + 1e-12) for unit, share in budgets.items()}

    def over() -> list[Unit]:
        return [unit for unit, limit in allowed.items() if costs.totals[unit] > limit]

    taken: list[Step] = []
    for step in steps:
        if not over():
            break
        costs.remove(step.group, step.channels)
        taken.append(step)
    for unit in over():
        raise ValueError(f"{unit}: {budgets[unit]:g} cannot be reached: with every removable channel gone, "
                         f"{costs.totals[unit] / costs.dense[unit]:.4g} of the {unit} remain; ask for more, lower the "
                         "floor, or ignore fewer layers")
    stuck: set[str] = set()  # groups whose last step does not fit: those before it are not to come back out of order
    removed: dict[str, list[int]] = defaultdict(list)
    for step in reversed(taken):
        if step.group not in stuck:
            costs.restore(step.group, step.channels)
            if not over():
                continue
            costs.remove(step.group, step.channels)
            stuck.add(step.group)
        removed[step.group] += step.channels
    return {group: torch.tensor(sorted(channels)) for group, channels in removed.items()}
