"""mask(): the channels that prune() would remove, read as zero (or as their means), without surgery."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastscore.arguments import check_fraction
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import Batch
from fastscore.default_device import own_on_cpu
from fastscore.graph import blocks
from fastscore.graph.groups import ChannelGroup, Ignore
from fastscore.graph.heads import head_dims
from fastscore.graph.layer_types import groups_left
from fastscore.graph.whole_experts import never_chosen
from fastscore.modules.attention import multihead_attention
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.handles import Handle
from fastscore.modules.hooks import OwnHook, input_of, reading_zero
from fastscore.modules.inspection import channel_dim, device_of
from fastscore.modules.narrower import staying
from fastscore.modules.weights import held_weights
from fastscore.modules.wrappers import uncompiled, unwrapped
from fastscore.pruning.budgets.costs import Costs
from fastscore.pruning.budgets.selection import OutOfReachError, rounded_up, scored_graph, select
from fastscore.pruning.options import Budgets, Ranking, Scope, resolve_compensate
from fastscore.pruning.order.ranking import rank
from fastscore.pruning.result import PruneResult
from fastscore.recovery.compensation import mean_contributions, removed_means, removed_positions
from fastscore.rng import fork_rng
from fastscore.scoring.scores import Scores


@contextmanager
def mask(model: nn.Module, scores: Scores, fraction: float | PruneResult, example_inputs: Batch, *,
         scope: Scope = "global", compensate: bool | None = None, ignore: Ignore = (),
         forward: Forward = call_model) -> Iterator[Mapping[str, Tensor]]:
    """Within the block, the `fraction` of channels with the lowest scores reads as zero in every consumer.

    The model computes what it would compute without those channels: a GroupNorm, too, takes the statistics of those
    that stay. No parameter changes, and the hooks go on leaving. With scores of units="norms" the outputs of BatchNorms
    are set instead, in a copy.

    Args:
        model: the model that was scored.
        scores: of its channels, by fastscore.score.
        fraction: the share of all channels to mask, 0 <= fraction < 1; or what fastscore.prune returned for this model
            and these scores, by whatever budget: the same channels are masked.
        example_inputs: a batch that `forward(model, batch)` takes, for tracing.
        scope: which channels are compared with each other: see fastscore.prune.
        compensate: add to each consumer's output what the channels gave it on average, as prune(compensate=True) does
            to its bias; with units="norms", set channels to their means. None: where the scores hold means.
        ignore: layers (names with `*`, types, modules) to leave as they are.
        forward: how the model is called on a batch.

    Yields:
        Layer -> removed channels, int64 [R], ascending, as PruneResult.removed has them.

    Raises:
        ValueError: a fraction outside [0, 1) or out of reach, scores or a result of another model, compensate without
            means.
    """
    if not isinstance(fraction, PruneResult):
        check_fraction(fraction)
    with ExitStack() as attached:
        with own_on_cpu():
            removed, handles = _prepared(unwrapped(model), scores, fraction, example_inputs, Ranking(scope),
                                         compensate, ignore, forward)
            attached.enter_context(uncompiled(model))
            for handle in handles:
                attached.enter_context(handle)
        yield removed


def _prepared(model: nn.Module, scores: Scores, fraction: float | PruneResult, example_inputs: Batch,
              ranking: Ranking, compensate: bool | None, ignore: Ignore, forward: Forward
              ) -> tuple[dict[str, Tensor], Iterator[RemovableHandle | Handle]]:
    """(what goes, the hooks that mask it, which are set one after the other). See mask."""
    graph = scored_graph(model, scores, example_inputs, forward, ignore)
    compensate = resolve_compensate(compensate, scores)
    eval_model = evaluation_copy(model)
    with fork_rng(device_of(eval_model)):
        costs = Costs(eval_model, graph.groups, example_inputs, forward, batch_dim=graph.samples.batch)
        if isinstance(fraction, PruneResult):
            removed = _of_result(fraction, graph.groups)
            for name, channels in removed.items():
                costs.remove(name, channels.tolist())
        else:
            budgets = Budgets(channels=1 - fraction)
            order = rank(eval_model, graph.groups, scores, costs, budgets, ranking, example_inputs, forward)
            try:
                removed = select(order, costs, budgets.counted)
            except OutOfReachError as error:
                raise ValueError(f"fraction: {fraction:g} cannot be reached: with every channel masked that can be, "
                                 f"{rounded_up(error.least)} of all channels remain; ask for less, or ignore fewer "
                                 "layers") from error
        positions = removed_positions(graph.groups, removed)
        means = removed_means(model, scores.means, positions, graph.groups, graph.kept_biases) if compensate else {}
        handles: Iterator[RemovableHandle | Handle]
        if scores.origin.units == "norms":
            handles = at_gates(model, positions, means)
        else:
            added = mean_contributions(eval_model, means, example_inputs, forward) if means else {}
            branches = [group for group in graph.groups if group.name in removed and any(group.role("block"))]
            read = removed_positions(graph.groups, removed, "reader")  # by those, too, whose output is a choice alone
            routers = [member.layer for group in graph.groups for member in group.role("router")
                       if group.name in removed]
            made = [member.layer for group in graph.groups if group.name in removed for member in group.role("query")]
            handles = itertools.chain(held_weights.replace(model, routers), at_consumers(model, read, added, made),
                                      at_group_norms(model, graph.groups, removed),
                                      never_chosen(model, graph.groups, removed),
                                      blocks.zero_outputs(model, branches),
                                      head_dims.zero_queries(model, graph.groups, removed))
    return costs.with_others(removed), handles


def _of_result(result: PruneResult, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """What went. Raises ValueError where it is not of these groups."""
    widths, were = ({row.layer: row.channels[0] for row in result.report.groups},
                    {group.name: group.channels for group in groups})
    for name in result.removed:
        if widths.get(name) != were.get(name):
            raise ValueError(f"fraction: the result is of another model, or other units were scored: {name} has "
                             f"{widths.get(name, 'no')} channels there and {were.get(name, 'none that can go')} here; "
                             "give the model that was pruned, as it was, and its scores")
    return dict(result.removed)


def at_consumers(model: nn.Module, positions: Mapping[str, Tensor], added: Mapping[str, Tensor],
                 made: Iterable[str] = ()
                 ) -> Iterator[RemovableHandle | Handle]:
    """Hooks by which layers read zero at `positions` of their inputs, and add float64 [C_out] to their outputs. made:
    layers whose outputs other hooks change."""
    yield from multihead_attention.replace_attention(model, called=())  # hooks take no nested tensors
    yield from held_weights.replace(model, [*positions, *made])
    yield from multihead_attention.replace_attention(model, [*positions, *made])
    for name, index in positions.items():
        layer = model.get_submodule(name)
        yield layer.register_forward_pre_hook(reading_zero(index, channel_dim(layer)), with_kwargs=True)
    for name, value in added.items():  # before the hooks that the layer has: it is part of the layer, as its bias is
        yield model.get_submodule(name).register_forward_hook(OwnHook(partial(_add, value)), prepend=True)


def at_group_norms(model: nn.Module, groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor]
                   ) -> Iterator[RemovableHandle]:
    """Hooks by which GroupNorms compute of the channels that stay what a smaller one does; what they make of the
    others, which nothing reads, stays as it is."""
    positions: dict[str, list[Tensor]] = defaultdict(list)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    for group in groups:
        for member, index in group.removed_at(removed[group.name]) if group.name in removed else ():
            if member.layer in norms and member.role == "channelwise":
                positions[member.layer].append(index)
    for name, parts in positions.items():
        narrowed = OwnHook(partial(_narrowed, torch.cat(parts)))
        yield model.get_submodule(name).register_forward_hook(narrowed, with_kwargs=True, prepend=True)


def at_gates(model: nn.Module, positions: Mapping[str, Tensor],
             means: Mapping[str, Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that set the outputs of BatchNorms at `positions` to their means (float64 [C]), or to zero without any."""
    for name, index in positions.items():
        value = means[name][index] if name in means else torch.zeros(len(index))
        yield model.get_submodule(name).register_forward_hook(OwnHook(partial(_set, index, value)))


def _add(value: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + _along_channels(value, module, output)


def _narrowed(gone: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = input_of(args, kwargs)
    stays = staying(x.shape[1], gone).to(x.device)
    narrow: Any = copy.copy(module)
    narrow.num_channels = len(stays)
    narrow.num_groups = groups_left(narrow.num_groups, x.shape[1], set(gone.tolist()))
    narrow._parameters = {name: None if parameter is None else parameter.index_select(0, stays)
                          for name, parameter in module._parameters.items()}
    return output.index_copy(1, stays, type(module).forward(narrow, x.index_select(1, stays)))


def _set(index: Tensor, value: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    rows = _along_channels(value, module, output).expand_as(output.narrow(channel_dim(module), 0, len(index)))
    return output.index_copy(channel_dim(module), index.to(output.device), rows)


def _along_channels(value: Tensor, layer: nn.Module, output: Tensor) -> Tensor:
    """[C] in a shape that broadcasts over the layer's output, with its device and dtype."""
    shape = [1] * output.dim()
    shape[channel_dim(layer)] = -1
    return value.to(output.device, output.dtype).reshape(shape)
