"""prune(): a smaller network from scores and a budget."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, call_model, checked_forward
from fastscore.graph.groups import ChannelGraph, Ignore, norm_gates
from fastscore.graph.surgery import RemovedIndices, remove_indices, removed_indices
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import remove_copied_hooks
from fastscore.modules.inspection import device_of
from fastscore.pruning import recipes
from fastscore.pruning.costs import Costs, Resource, count
from fastscore.pruning.hardware import channel_multiple
from fastscore.pruning.latency import select_by_latency
from fastscore.pruning.report import Candidate, GroupReport, PruneReport
from fastscore.pruning.selection import Scope, channel_costs, check_scores, layer_kinds, removal_order, select
from fastscore.recovery.compensation import (
    add_to_biases,
    mean_contributions,
    removed_means,
    removed_positions,
    resolve_compensate,
)
from fastscore.rng import fork_rng
from fastscore.scoring.scores import Scores


@dataclass(frozen=True)
class PruneResult:
    """model: the smaller network, an ordinary module. report: what was done. removed: layer -> removed channels.

    removed_indices: (layer, its inputs or outputs) -> positions that went. new_biases: layers that got a bias. Both are
    what fastscore.rebuild_optimizer and fastscore.save_pruned go by.
    """

    model: nn.Module
    report: PruneReport
    removed: Mapping[str, Tensor]
    removed_indices: RemovedIndices
    new_biases: tuple[str, ...]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the channels and MACs of each layer before and after, to an image file.

        Raises ImportError without matplotlib (pip install 'torch-fastscore[plot]'), ValueError for an unknown suffix.
        """
        from fastscore.plots import check
        from fastscore.pruning.plots import pruning

        check(path)
        pruning(self.report, path)


def prune(model: nn.Module, scores: Scores, example_inputs: Batch, *, channels: float | None = None,
          params: float | None = None, macs: float | None = None, latency: float | None = None,
          scope: Scope = "global", cost_aware: bool = False, round_to: int | Literal["auto"] = 1,
          floor: float | Mapping[str, float] = 0.0, compensate: bool | None = None, ignore: Ignore = (),
          forward: Forward = call_model, inplace: bool = False) -> PruneResult:
    """Remove the least important channels of `model` until a budget holds; returns a new model unless inplace.

    channels, params, macs: one or more budgets, each what REMAINS as a share of the original, 0 < share <= 1; met
    exactly or from below, by less than any one removed step. latency: what remains of the time that one call takes on
    the example inputs, measured on the present device, beside the dense model, in medians; candidates along the removal
    order are built and timed until one is below the budget by at most 0.02, twice, or its neighbour is over it (see
    fastscore.pruning.latency). report.candidates is the curve.
    scope: "global" (compare across layers), "layer" (all layers shrink alike) or "isomorphic" (compare within each
    class of groups that are made, passed and read by the same kinds of layers; all classes shrink alike). cost_aware:
    rank by importance per MAC that a channel costs in the dense model, per parameter where params is the only budget.
    round_to: remaining widths are multiples of it; "auto": of 8, 16 or 32, by device and dtype (see
    fastscore.pruning.hardware).
    floor: the share of each group's channels that stays in any case, or layer -> share (at least one always does).
    compensate: add what the channels gave to their consumers on average to the consumers' biases (see
    fastscore.recovery.compensation); consumers without a bias get one, which counts towards params. It takes
    scores with means: those of a criterion that reads gradients, or with means lent by such scores,
    dataclasses.replace(scores, means=other.means). None: where the scores hold means. False: the paper's way,
    removed channels read as zero.
    ignore: layers (names with `*`, types, modules) to leave alone. example_inputs: a batch that
    `forward(model, batch)` takes, for tracing and counting MACs; convolutions that pad with zeros are compensated at
    its height and width.

    Parameters of the result are new objects: make a new optimizer, or fastscore.rebuild_optimizer.
    Raises, before anything is changed, ValueError: a budget outside (0, 1] or out of reach, scores of another model, of
    units="norms", or without the means to compensate with, a model that cannot be traced; FloatingPointError: means
    that are NaN or infinite.
    """
    budgets = _budgets({"channels": channels, "params": params, "macs": macs}, latency)
    _check_ranking(scope, cost_aware, round_to, floor)
    if scores.origin.units != "groups":
        raise ValueError('scores: they are of single BatchNorms (units="norms"), whose channels can be masked but not '
                         'removed: to prune, score with units="groups"')
    compensate = resolve_compensate(compensate, scores)
    graph = scored_graph(model, scores, example_inputs, forward, ignore)
    eval_model = evaluation_copy(model)
    with fork_rng(device_of(eval_model)):
        costs = Costs(eval_model, graph.groups, example_inputs, checked_forward(forward), compensate)
        before = costs.returned.shape
        dense = _group_costs(costs)
        kinds = layer_kinds(model, graph.groups) if scope == "isomorphic" else None
        channel_cost = channel_costs(costs, "params" if set(budgets) == {"params"} else "macs") if cost_aware else None
        if round_to == "auto":
            round_to = channel_multiple(eval_model)
        order = removal_order(graph.groups, scores, scope, round_to, floor, kinds, channel_cost)

        def surgery(removed: Mapping[str, Tensor]) -> _Surgery:
            means = removed_means(model, scores, removed_positions(graph.groups, removed)) if compensate else {}
            added = mean_contributions(eval_model, means, example_inputs, forward) if means else {}
            return _Surgery(model, removed_indices(graph.groups, removed), added)

        candidates: tuple[Candidate, ...] = ()
        if latency is None:
            removed = select(order, costs, budgets)
        else:
            removed, candidates = select_by_latency(
                order, costs, budgets, latency, lambda gone: surgery(gone).copy().eval(), eval_model, example_inputs,
                forward)
        chosen = surgery(removed)
        pruned = chosen.copy()
        modes = {name: module.training for name, module in pruned.named_modules()}
        after = _try(pruned.eval(), example_inputs, forward, before)
        for name, module in pruned.named_modules():
            module.training = modes[name]
    if inplace:
        pruned = chosen.on(model)
    rows = tuple(GroupReport(group.name, (group.channels, group.channels - len(removed.get(group.name, ()))),
                             (round(was[0]), round(now[0])), (round(was[1]), round(now[1])))
                 for group, was, now in zip(graph.groups, dense, _group_costs(costs), strict=True))
    report = PruneReport(
        rows, (int(costs.dense["channels"]), int(costs.totals["channels"])), (int(costs.dense["macs"]), after),
        (int(costs.dense["params"]), sum(parameter.numel() for parameter in pruned.parameters())), graph.skipped,
        candidates)
    return PruneResult(pruned, report, removed, chosen.removed_indices, chosen.new_biases)


class _Surgery:
    """What is done to a model, on copies or on itself: biases grow by `added`, then `removed_indices` go."""

    def __init__(self, model: nn.Module, removed_indices: RemovedIndices, added: Mapping[str, Tensor]) -> None:
        self._model, self.removed_indices, self._added = model, removed_indices, added
        self.new_biases = tuple(name for name in added if model.get_submodule(name).bias is None)
        self._recipe = recipes.extend(model, removed_indices, self.new_biases)

    def copy(self) -> nn.Module:
        # surgery makes new weights of most: those that are still the model's own afterwards are copied then
        # .data: detach() would share autograd's count of changes with the model's own, for good
        shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.data, parameter.requires_grad)
                                  for parameter in self._model.parameters() if type(parameter) is nn.Parameter}
        pruned = self.on(copy.deepcopy(self._model, shared))
        own = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        for parameter in pruned.parameters():
            if parameter.untyped_storage().data_ptr() in own:
                parameter.data = parameter.data.clone()
        remove_copied_hooks(pruned)
        return pruned

    def on(self, model: nn.Module) -> nn.Module:
        add_to_biases(model, self._added)
        recipes.attach(model, self._recipe)
        return remove_indices(model, self.removed_indices)


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


def _check_ranking(scope: Scope, cost_aware: bool, round_to: int | str,
                   floor: float | Mapping[str, float]) -> None:
    if cost_aware and scope == "layer":
        raise ValueError('cost_aware: scope="layer" compares no layer with another: use "global" or "isomorphic"')
    if (round_to != "auto") if isinstance(round_to, str) else (round_to < 1):
        raise ValueError(f"round_to: {round_to!r}; it must be 'auto', or 1 or more")
    for share in floor.values() if isinstance(floor, Mapping) else (floor,):
        if not 0 <= share <= 1:
            raise ValueError(f"floor: {share} is outside [0, 1]; it is the share of each group's channels that stays")


def _budgets(shares: Mapping[Resource, float | None], latency: float | None) -> dict[Resource, float]:
    for name, share in (*shares.items(), ("latency", latency)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}: {share} is outside (0, 1]; it is the share that remains")
    budgets = {unit: share for unit, share in shares.items() if share is not None}
    if not budgets and latency is None:
        raise ValueError("prune: name a budget: channels=, params=, macs= or latency=, what remains of the original")
    return budgets


def _try(model: nn.Module, example_inputs: Batch, forward: Forward, expected: torch.Size) -> int:
    """Run the pruned model; its MACs. Raises RuntimeError where it no longer fits together."""
    try:
        macs, _, output = count(model, example_inputs, checked_forward(forward))
    except Exception as error:
        raise RuntimeError(f"the pruned model does not run ({error}): its forward depends on a width that changed; "
                           "ignore the layers it names") from error
    if output.shape != expected:
        raise RuntimeError(f"the pruned model returns {tuple(output.shape)} instead of {tuple(expected)}: ignore the "
                           "layers that make its output")
    return macs


def _group_costs(costs: Costs) -> list[tuple[float, float]]:
    """(MACs, parameters) of each group's own layers; a layer of several groups counts with the first."""
    counted: set[str] = set()
    rows = []
    for group in costs.groups.values():
        own = [member.layer for member in group.members if member.role != "consumer" and member.layer not in counted]
        counted.update(own)
        rows.append((sum(costs.layers[layer].macs for layer in own), sum(costs.layers[layer].params for layer in own)))
    return rows
