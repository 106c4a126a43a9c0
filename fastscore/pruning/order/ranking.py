"""In which order channels go: steps of channels of one group, by importance. No model is touched here."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.graph.groups import ChannelGroup
from fastscore.modules.weights.experts import ExpertLinear
from fastscore.pruning.budgets.costs import Costs, Resource, channel_multiple
from fastscore.pruning.budgets.layer_times import layer_seconds
from fastscore.pruning.options import Budgets, Ranking, Scope
from fastscore.scoring.scores import Scores

_GROUPED_PRODUCT = 16  # bytes, of which strides are multiples (torch._grouped_mm)


@dataclass(frozen=True, slots=True)
class RemovalStep:
    """Channels of one group that go at once, and the value by which steps are ordered; beside them those of other
    groups that stay as wide as it (scope="layer").

    whole: it is a residual branch, or an expert, with all of its layers.
    """

    group: str
    channels: tuple[int, ...]
    value: float
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()
    whole: bool = False

    @property
    def parts(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(group, its channels) of all groups that lose some."""
        return (self.group, self.channels), *self.beside

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that lose channels."""
        return tuple(group for group, _ in self.parts)

    def remove(self, costs: Costs) -> None:
        """Take its channels away from what a network costs."""
        for group, channels in self.parts:
            costs.remove(group, channels)

    def restore(self, costs: Costs) -> None:
        """Give its channels back."""
        for group, channels in self.parts:
            costs.restore(group, channels)


def rank(model: nn.Module, groups: tuple[ChannelGroup, ...], scores: Scores, costs: Costs, budgets: Budgets,
         ranking: Ranking, example_inputs: Batch, forward: Forward) -> list[RemovalStep]:
    """The steps in which channels of `model`, an evaluation copy, go, least important first.

    costs: of the whole model, left as they are. Raises ValueError for a floor of a group that there is not.
    """
    return ranker(model, groups, scores, costs, budgets, ranking, example_inputs, forward)[0](scores)


def ranker(model: nn.Module, groups: tuple[ChannelGroup, ...], scores: Scores, costs: Costs, budgets: Budgets,
           ranking: Ranking, example_inputs: Batch, forward: Forward
           ) -> tuple[Callable[[Mapping[str, Tensor]], list[RemovalStep]], dict[str, Tensor] | None]:
    """(`rank` by the scores, or by what stands in for them, as a function; what each channel costs, None where that
    does not count)."""
    if ranking.scope == "layer" and len(groups) > 1 and any(any(group.role("block")) for group in groups):
        raise ValueError('scope: "layer" takes the same share of every layer, and residual branches (units="blocks") '
                         'go whole or stay: use scope="global"')
    kinds = layer_kinds(model, groups) if ranking.scope == "isomorphic" else None
    cost_aware = counts_per_cost(scores, budgets, ranking.scope) if ranking.cost_aware is None else ranking.cost_aware
    per_channel = _cost_of_channels(model, costs, budgets, example_inputs, forward) if cost_aware else None
    multiple = channel_multiple(model) if ranking.round_to == "auto" else ranking.round_to
    multiples = {group.name: 1 if any(group.role("router")) else math.lcm(multiple, _aligned(model, group))
                 for group in groups}

    def ranked(values: Mapping[str, Tensor]) -> list[RemovalStep]:
        return removal_order(groups, values, ranking.scope, multiples, ranking.floor, kinds, per_channel)

    return ranked, per_channel


def _aligned(model: nn.Module, group: ChannelGroup) -> int:
    """What a group's width stays a multiple of whatever was asked for: experts whose rows begin at multiples of 16
    bytes go on doing so, since PyTorch's product of all experts at once takes no others."""
    multiple = 1
    for member in group.role("consumer"):
        layer = model.get_submodule(member.layer)
        if isinstance(layer, ExpertLinear):
            weight, positions = layer.weight, len(member.index.unique())
            numbers = max(_GROUPED_PRODUCT // weight.dtype.itemsize, 1)
            if weight.shape[-1] % numbers == 0:
                channels = numbers * group.channels
                multiple = math.lcm(multiple, channels // math.gcd(channels, positions))
    return multiple


def counts_per_cost(scores: Scores, budgets: Budgets, scope: Scope) -> bool:
    """Whether importances count per cost unless the caller says otherwise: the budget is a cost, layers are compared,
    and importances are in units of the output's change. Norms of weights are not: per MAC, they left 0 to 6 % of
    MobileNetV2's accuracy (docs/recovery.md)."""
    measures_outputs = scores.origin.gradient != "none" and scores.origin.layerwise == "none"
    return measures_outputs and scope != "layer" and set(budgets.given) != {"channels"}


def _cost_of_channels(model: nn.Module, costs: Costs, budgets: Budgets, example_inputs: Batch,
                      forward: Forward) -> dict[str, Tensor]:
    """In MACs, in parameters, or in seconds: the first of them that has a budget; MACs where none has."""
    if set(budgets.given) == {"latency"}:
        return time_costs(costs, layer_seconds(model, costs.layers, example_inputs, forward))
    return channel_costs(costs, "params" if budgets.params is not None and budgets.macs is None else "macs")


def removal_order(groups: tuple[ChannelGroup, ...], scores: Mapping[str, Tensor], scope: Scope = "global",
                  round_to: int | Mapping[str, int] = 1,
                  floor: float | Mapping[str, float] = 0.0, kinds: Mapping[str, str] | None = None,
                  channel_costs: Mapping[str, Tensor] | None = None) -> list[RemovalStep]:
    """The steps in which channels of groups go, least important first; ties in order of group and channel.

    scope: "global" compares importances across groups; "layer" their rank within each group, so that all groups shrink
    alike, and those of equal width stay equally wide; "isomorphic" (arXiv 2407.04616) their rank among the groups whose
    channels the same `kinds` of layers (see layer_kinds) make, pass and read, so that all such classes shrink alike.
    round_to: widths that remain are multiples of it (where a group is wide enough), or group -> its multiple. floor:
    the share of each group's channels that stays whatever the budget, or group -> share; at least one channel stays
    always. channel_costs: group -> float64 [C], what each channel costs: importances count per cost (1 for every
    channel without it). Raises ValueError for a floor of a group that there is not.
    """
    classes: dict[object, list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        if group.name in scores:
            classes[_class_of(group, scope, kinds or {})].append(group)
    floors = floor if isinstance(floor, Mapping) else {group.name: floor for group in groups}
    for name in set(floors) - {group.name for group in groups}:
        raise ValueError(f"floor: {name!r} makes no channels that can go; list(scores) names the layers that do")
    order: list[RemovalStep] = []
    for members in classes.values():
        steps = []
        for group in members:
            multiple = round_to if isinstance(round_to, int) else round_to.get(group.name, 1)
            costs = torch.ones(group.channels) if channel_costs is None else channel_costs[group.name]
            steps += _group_steps(group, scores[group.name].double(), costs, multiple, floors.get(group.name, 0.0))
        steps.sort(key=lambda step: step.value)  # stable: ties keep the order of groups and channels
        order += steps if scope == "global" else _by_rank(steps, sum(group.channels for group in members))
    order.sort(key=lambda step: step.value)
    return _side_by_side(order) if scope == "layer" else order


def _side_by_side(order: Iterable[RemovalStep]) -> list[RemovalStep]:
    """The same order, where groups whose steps are as many and as large as each other's take each of them at once."""
    steps: dict[str, list[RemovalStep]] = defaultdict(list)
    for step in order:
        steps[step.group].append(step)
    alike: dict[tuple[tuple[int, float], ...], list[str]] = defaultdict(list)
    for group, own in steps.items():
        alike[tuple((len(step.channels), step.value) for step in own)].append(group)
    joined = [replace(first, beside=tuple((step.group, step.channels) for step in others))
              for groups in alike.values() for first, *others in zip(*(steps[group] for group in groups), strict=True)]
    return sorted(joined, key=lambda step: step.value)


def layer_kinds(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, str]:
    """Layer of a group -> its type; of a convolution its kernel too, and whether it is depthwise."""
    kinds = {}
    for name, module in {(member.layer, member.module) for group in groups for member in group.members}:
        layer = model.get_submodule(module)
        kinds[name] = type(layer).__name__ + name.removeprefix(module)
        if isinstance(layer, nn.modules.conv._ConvNd):
            kinds[name] += f" {layer.kernel_size}{' depthwise' if 1 < layer.groups == layer.out_channels else ''}"
    return kinds


def channel_costs(costs: Costs, unit: Resource) -> dict[str, Tensor]:
    """Group -> float64 [C]: how much of `unit` the dense model saves when a channel of it goes alone."""
    whole, biases = dict(costs.totals), {name: layer.bias_below for name, layer in costs.layers.items()}
    for layer in costs.layers.values():
        layer.bias_below = 0  # the bias that a consumer gets with the first channel is not that channel's
    found: dict[str, Tensor] = {}
    for name, group in costs.groups.items():
        row: dict[object, float] = {}
        kinds = [costs.alike(name, channel) for channel in range(group.channels)]
        for channel, kind in enumerate(kinds):
            if kind not in row:
                costs.remove(name, [channel])
                row[kind] = whole[unit] - costs.totals[unit]
                costs.restore(name, [channel])
                costs.totals.update(whole)
        found[name] = torch.tensor([row[kind] for kind in kinds], dtype=torch.float64)
    for name, below in biases.items():
        costs.layers[name].bias_below = below
    return found


def time_costs(costs: Costs, seconds: Mapping[str, float]) -> dict[str, Tensor]:
    """Group -> float64 [C]: the seconds that the dense model saves when a channel of it goes alone, where the time of
    each layer (its `seconds`) grows with its width as its MACs do."""
    macs = {name: layer.macs_per_width for name, layer in costs.layers.items()}
    try:
        for name, layer in costs.layers.items():
            layer.macs_per_width = seconds[name] / layer.width
        return channel_costs(costs, "macs")
    finally:
        for name, layer in costs.layers.items():
            layer.macs_per_width = macs[name]


def _class_of(group: ChannelGroup, scope: Scope, kinds: Mapping[str, str]) -> object:
    """Groups of one class are compared with each other."""
    if scope == "isomorphic":
        return frozenset((member.role, kinds[member.layer]) for member in group.members)
    return group.name if scope == "layer" else None


def _by_rank(steps: list[RemovalStep], channels: int) -> list[RemovalStep]:
    """Steps, in their order, with the share of all `channels` that went before each as its value."""
    before = itertools.accumulate((len(step.channels) for step in steps), initial=0)
    return [replace(step, value=count / channels) for step, count in zip(steps, before, strict=False)]


def _group_steps(group: ChannelGroup, values: Tensor, costs: Tensor, round_to: int,
                 floor: float) -> list[RemovalStep]:
    units: dict[int, tuple[int, ...]] = {}
    for channel, unit in enumerate(group.unit.tolist()):
        units[unit] = (*units.get(unit, ()), channel)

    value_of, cost_of = values.tolist(), costs.tolist()  # a tensor for each would take most time

    def priority(channels: tuple[int, ...]) -> float:
        if len(channels) == 1:
            cost, value = cost_of[channels[0]], value_of[channels[0]]
        else:
            cost, value = (math.fsum([of[channel] for channel in channels]) for of in (cost_of, value_of))
        return value / cost if cost > 0 else math.inf

    # of channels one stays, of experts as many as are chosen; a branch may go whole
    least = max(0 if any(group.role("block")) else group.least, math.ceil(floor * group.channels - 1e-9))
    parts = [set(member.channel.tolist()) for member in group.members]
    parts = [part for part in parts if part and len(part) < group.channels]  # of these a channel stays in each, too
    steps: list[RemovalStep] = []
    pending: tuple[int, ...] = ()
    kept, below = group.channels, -math.inf
    whole = any(group.role("block")) or any(group.role("router"))
    going = sorted(((priority(channels), channels) for channels in units.values()), key=lambda pair: pair[0])
    if group.section is not None:
        going = [(priority(channels), channels) for channels in _from_each_section(group.section.tolist(), going)]
        round_to *= int(group.section.max()) + 1
    for alone, channels in going:
        if any(part.issubset(channels) for part in parts):
            continue
        pending += channels
        kept -= len(channels)
        if kept < least:
            break
        for part in parts:
            part.difference_update(channels)
        if kept % round_to == 0:
            # a step cannot go before the one below it in its own group
            below = max(alone if len(pending) == len(channels) else priority(pending), below)
            steps.append(RemovalStep(group.name, pending, below, whole=whole))
            pending = ()
    return steps


def _from_each_section(section: list[int], going: Iterable[tuple[float, tuple[int, ...]]]) -> Iterator[tuple[int, ...]]:
    """Channels that go at once: of each section as many, its least important first. going: (priority, channels of a
    unit), least important first."""
    waiting: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for _, channels in going:
        waiting[section[channels[0]]].append(channels)
    size = max(len(channels) for units in waiting.values() for channels in units)
    rows = [itertools.chain.from_iterable(units) for _, units in sorted(waiting.items())]
    while all(each := [tuple(itertools.islice(row, size)) for row in rows]):
        yield tuple(itertools.chain.from_iterable(each))
