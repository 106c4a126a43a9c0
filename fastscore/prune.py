"""prune(): a smaller network from scores and a budget; mask(): the same channels read as zero, without surgery."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, checked, device_of, fork_rng
from fastscore.batches import forward as call_model
from fastscore.costs import Costs, Unit, total_macs
from fastscore.evaluation import evaluation_copy
from fastscore.groups import ChannelGraph, ChannelGroup, Ignore
from fastscore.scores import Scores
from fastscore.selection import Scope, check_scores, removal_order, select
from fastscore.taps import OwnHook, remove_copied_hooks
from fastscore.tracing import trace


@dataclass(frozen=True)
class GroupReport:
    """One group before and after: its channels, and the MACs (of one sample) and parameters of the layers that make
    its channels or work on each of them."""

    layer: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]


@dataclass(frozen=True)
class PruneReport:
    """What prune() did. Pairs are (before, after); MACs are those of one sample."""

    groups: tuple[GroupReport, ...]
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.layer) for row in self.groups)])
        lines = [f"{'layer':<{width}} {'channels':>14} {'MACs':>25} {'parameters':>23}"]
        rows = [(row.layer, row.channels, row.macs, row.params) for row in self.groups]
        for layer, channels, macs, params in [*rows, ("model", self.channels, self.macs, self.params)]:
            lines.append(f"{layer:<{width}} {channels[0]:>6} → {channels[1]:<5} {macs[0]:>11,} → {macs[1]:<11,} "
                         f"{params[0]:>10,} → {params[1]:<10,}")
        remains = ", ".join(f"{after / max(before, 1):.1%} of the {unit}" for unit, (before, after)
                            in (("channels", self.channels), ("MACs", self.macs), ("parameters", self.params)))
        lines.append(f"remains: {remains}")
        lines += [f"{layer}: left alone: {reason}" for layer, reason in self.skipped.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class PruneResult:
    """model: the smaller network, an ordinary module. report: what was done. removed: layer -> removed channels."""

    model: nn.Module
    report: PruneReport
    removed: Mapping[str, Tensor]


def prune(model: nn.Module, scores: Scores, example_inputs: Batch, *, channels: float | None = None,
          params: float | None = None, macs: float | None = None, scope: Scope = "global", round_to: int = 1,
          floor: float = 0.0, ignore: Ignore = (), forward: Forward = call_model,
          inplace: bool = False) -> PruneResult:
    """Remove the least important channels of `model` until a budget holds; returns a new model unless inplace.

    channels, params, macs: one or more budgets, each what REMAINS as a share of the original, 0 < share <= 1; met
    exactly or from below, by less than any one removed step. scope: "global" (compare across layers) or "layer" (all
    layers shrink alike). round_to: remaining widths are multiples of it. floor: the share of each group's channels
    that stays in any case (at least one always does). ignore: layers (names with `*`, types, modules) to leave alone.
    example_inputs: a batch that `forward(model, batch)` takes, for tracing and counting MACs.

    Parameters of the result are new objects: make a new optimizer for it. Raises ValueError before anything is changed:
    a budget outside (0, 1] or out of reach, scores of another model, a model that cannot be traced.
    """
    budgets = _budgets({"channels": channels, "params": params, "macs": macs})
    if round_to < 1 or not 0 <= floor <= 1:
        raise ValueError(f"round_to must be 1 or more and floor within [0, 1]; they are {round_to} and {floor}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope: {scope!r} is neither 'global' nor 'layer'")
    graph = _graph(model, scores, example_inputs, forward, ignore)
    twin = evaluation_copy(model)
    with fork_rng(device_of(twin)):
        before = checked(forward)(twin, example_inputs).shape
        costs = Costs(twin, graph.groups, example_inputs, forward)
        dense = _group_costs(costs)
        removed = select(removal_order(graph.groups, scores, scope, round_to, floor), costs, budgets)
        pruned = remove_channels(copy.deepcopy(model), graph.groups, removed)
        remove_copied_hooks(pruned)
        modes = {name: module.training for name, module in pruned.named_modules()}
        after = _try(pruned.eval(), example_inputs, forward, before)
        for name, module in pruned.named_modules():
            module.training = modes[name]
    if inplace:
        pruned = remove_channels(model, graph.groups, removed)
    rows = tuple(GroupReport(group.name, (group.channels, group.channels - len(removed.get(group.name, ()))),
                             (round(was[0]), round(now[0])), (round(was[1]), round(now[1])))
                 for group, was, now in zip(graph.groups, dense, _group_costs(costs), strict=True))
    report = PruneReport(
        rows, (int(costs.dense["channels"]), int(costs.totals["channels"])), (int(costs.dense["macs"]), after),
        (int(costs.dense["params"]), sum(parameter.numel() for parameter in pruned.parameters())), graph.skipped)
    return PruneResult(pruned, report, removed)


@contextmanager
def mask(model: nn.Module, scores: Scores, fraction: float, example_inputs: Batch, *, scope: Scope = "global",
         ignore: Ignore = (), forward: Forward = call_model) -> Iterator[Mapping[str, Tensor]]:
    """Within the block, the `fraction` of channels with the lowest scores reads as zero in every consumer.

    The model computes what it would compute without those channels (but for a GroupNorm, whose statistics are those of
    all channels until surgery); no parameter changes, and the hooks go on leaving.
    Yields layer -> removed channels, int64, ascending. Raises ValueError for a fraction outside [0, 1) or out of reach,
    and for scores of another model.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction}; it is the share of channels to mask, 0 <= fraction < 1")
    graph = _graph(model, scores, example_inputs, forward, ignore)
    twin = evaluation_copy(model)
    with fork_rng(device_of(twin)):
        costs = Costs(twin, graph.groups, example_inputs, forward)
    removed = select(removal_order(graph.groups, scores, scope), costs, {"channels": 1 - fraction})
    handles = [model.get_submodule(layer).register_forward_pre_hook(_zero(index, layer, model))
               for layer, index in _consumer_places(graph.groups, removed).items()]
    try:
        yield removed
    finally:
        for handle in handles:
            handle.remove()


def remove_channels(model: nn.Module, channel_groups: tuple[ChannelGroup, ...],
                    removed: Mapping[str, Tensor]) -> nn.Module:
    """Take the channels of `removed` (group -> int64 [R]) out of every layer of `model`, in place; returns it."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    places: dict[tuple[str, bool], set[int]] = defaultdict(set)
    for group in channel_groups:
        gone = torch.zeros(group.channels, dtype=torch.bool)
        gone[removed.get(group.name, torch.empty(0, dtype=torch.int64))] = True
        for member in group.members:
            places[member.layer, member.role == "consumer"].update(member.index[gone[member.channel]].tolist())
    for (name, reads), index in places.items():
        if index:
            layer = model.get_submodule(name)
            surgeon = tp.function.PrunerBox[tp.ops.module2type(layer)]
            (surgeon.prune_in_channels if reads else surgeon.prune_out_channels)(layer, sorted(index))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    return model


def _budgets(shares: Mapping[Unit, float | None]) -> dict[Unit, float]:
    budgets = {unit: share for unit, share in shares.items() if share is not None}
    if not budgets:
        raise ValueError("prune: name a budget: channels=, params= or macs=, what remains of the original")
    for unit, share in budgets.items():
        if not 0 < share <= 1:
            raise ValueError(f"{unit}: {share} is outside (0, 1]; it is the share that remains")
    return budgets


def _graph(model: nn.Module, scores: Scores, example_inputs: Batch, forward: Forward,
           ignore: Ignore) -> ChannelGraph:
    """The groups that have scores and are not ignored."""
    whole = trace(model, example_inputs, forward)
    check_scores(whole, scores)
    graph = whole.without(model, ignore)
    scored = tuple(group for group in graph.groups if group.name in scores)
    unscored = {group.name: scores.skipped.get(group.name, "no score") for group in graph.groups
                if group.name not in scores}
    return replace(graph, groups=scored, skipped={**graph.skipped, **unscored})


def _try(model: nn.Module, example_inputs: Batch, forward: Forward, expected: torch.Size) -> int:
    """Run the pruned model; its MACs. Raises RuntimeError where it no longer fits together."""
    try:
        with torch.no_grad():
            shape = checked(forward)(model, example_inputs).shape
    except Exception as error:
        raise RuntimeError(f"the pruned model does not run ({error}): its forward depends on a width that changed; "
                           "ignore the layers it names") from error
    if shape != expected:
        raise RuntimeError(f"the pruned model returns {tuple(shape)} instead of {tuple(expected)}: ignore the layers "
                           "that make its output")
    return total_macs(model, example_inputs, forward)


def _group_costs(costs: Costs) -> list[tuple[float, float]]:
    """(MACs, parameters) of each group's own layers; a layer of several groups counts with the first."""
    counted: set[str] = set()
    rows = []
    for group in costs.groups.values():
        own = [member.layer for member in group.members if member.role != "consumer" and member.layer not in counted]
        counted.update(own)
        rows.append((sum(costs.layers[layer].macs for layer in own), sum(costs.layers[layer].params for layer in own)))
    return rows


def _consumer_places(channel_groups: tuple[ChannelGroup, ...], removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Consumer -> the positions of its input that are gone."""
    places: dict[str, list[Tensor]] = defaultdict(list)
    for group in channel_groups:
        if group.name in removed:
            gone = torch.isin(torch.arange(group.channels), removed[group.name])
            for edge in group.role("consumer"):
                places[edge.layer].append(edge.index[gone[edge.channel]])
    return {layer: torch.cat(index) for layer, index in places.items()}


def _zero(index: Tensor, layer: str, model: nn.Module) -> Callable[..., Any]:
    dim = -1 if isinstance(model.get_submodule(layer), nn.Linear) else 1

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise TypeError(f"{layer}: its input arrives as a keyword argument; call it by position, or ignore it")
        return args[0].index_fill(dim, index.to(args[0].device), 0), *args[1:]

    return OwnHook(hook)
