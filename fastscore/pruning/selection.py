"""Which channels go: the first steps of the order that a budget asks for. No model is touched here."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward
from fastscore.graph.groups import ChannelGraph, Ignore, norm_gates
from fastscore.graph.tracing import trace
from fastscore.pruning.costs import Costs, Resource
from fastscore.pruning.ranking import RemovalStep
from fastscore.scoring.scores import Scores


def scored_graph(model: nn.Module, scores: Scores, example_inputs: Batch, forward: Forward,
                 ignore: Ignore) -> ChannelGraph:
    """The groups of `model` that have scores and are not ignored. Raises ValueError for scores of another model."""
    whole = trace(model, example_inputs, forward)
    if scores.origin.units == "norms":
        whole = norm_gates(model, whole)
    check_scores(whole, scores)
    graph = whole.without(model, ignore)
    scored = tuple(group for group in graph.groups if group.name in scores)
    unscored = {group.name: scores.skipped.get(group.name, "no score") for group in graph.groups
                if group.name not in scores}
    return replace(graph, groups=scored, skipped={**graph.skipped, **unscored})


def check_removable(scores: Scores) -> None:
    """Raise ValueError for scores of channels that no surgery can take out."""
    if scores.origin.units != "groups":
        raise ValueError('scores: they are of single BatchNorms (units="norms"), whose channels can be masked but not '
                         'removed: to prune, score with units="groups"')


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


def steps_needed(steps: list[RemovalStep], costs: Costs, budgets: Mapping[Resource, float]) -> int:
    """How many of `steps`, in order, must go for every budget to hold; they are gone from `costs` afterwards.

    budgets: what may remain, as a share of the dense cost. Raises ValueError, naming what can be reached, when all of
    them are not enough.
    """
    count = 0
    while over := _over(costs, budgets):
        if count == len(steps):
            unit = over[0]
            raise ValueError(f"{unit}: {budgets[unit]:g} cannot be reached: with every removable channel gone, "
                             f"{costs.totals[unit] / costs.dense[unit]:.4g} of the {unit} remain; ask for more, lower "
                             "the floor, or ignore fewer layers")
        costs.remove(steps[count].group, steps[count].channels)
        count += 1
    return count


def select(steps: list[RemovalStep], costs: Costs, budgets: Mapping[Resource, float]) -> dict[str, Tensor]:
    """Channels to remove so that every budget holds: group -> int64 [R], ascending.

    Steps go in order until it holds (see steps_needed); then the most important of the removed come back as long as it
    still does, so what remains is below the budget by less than any one of them.
    """
    taken = steps[:steps_needed(steps, costs, budgets)]
    stuck: set[str] = set()  # groups whose last step does not fit: those before it are not to come back out of order
    removed: dict[str, list[int]] = defaultdict(list)
    for step in reversed(taken):
        if step.group not in stuck:
            costs.restore(step.group, step.channels)
            if not _over(costs, budgets):
                continue
            costs.remove(step.group, step.channels)
            stuck.add(step.group)
        removed[step.group] += step.channels
    return {group: torch.tensor(sorted(channels)) for group, channels in removed.items()}


def _over(costs: Costs, budgets: Mapping[Resource, float]) -> list[Resource]:
    return [unit for unit, share in budgets.items() if costs.totals[unit] > share * costs.dense[unit] * (1 + 1e-12)]
