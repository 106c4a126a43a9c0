"""From what taps measure at layers to what the groups sum over: the columns of layers, added up by unit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.taps.measures import MEAN

_MAX_PRODUCTS = 2**26  # float64 numbers for one group: half a gibibyte

ByLayer: TypeAlias = Mapping[str, Sequence[Tensor]]  # layer -> sums [P, N, C_in], one for each call of it


class SideBySide(NamedTuple):
    """What taps measured, [P, N, ΣC_in], the layers one after another, and how wide each is."""

    layers: tuple[str, ...]
    widths: list[int]
    sums: Tensor

    @classmethod
    def of(cls, by_layer: ByLayer, mean: int | None = None) -> "SideBySide":
        """What several calls of a layer measured is added up, but for the part `mean`: see added_up."""
        columns = [added_up(calls, mean) for calls in by_layer.values()]
        device = columns[0].device
        return cls(tuple(by_layer), [column.shape[2] for column in columns],
                   torch.cat([column.to(device) for column in columns], 2))


def added_up(calls: Sequence[Tensor], mean: int | None) -> Tensor:
    """[P, N, C_in] of all calls of a layer. The part `mean` is averaged over those that read something: what takes the
    place of a channel is in the layer's bias, one and the same for all of its calls."""
    if len(calls) == 1:
        return calls[0]
    every = torch.stack(list(calls)).double()
    summed = every.sum(0)
    if mean is not None:
        summed[mean] = every[:, mean].nanmean(0)
    return summed


class _Rows(NamedTuple):
    """columns: int64 [M], of the layers side by side, in order of unit. lengths: int64 [U], how many each has."""

    columns: Tensor
    lengths: Tensor


class JointSums:
    """s of every group at once: a pass over a model of many layers costs a few operations, not a few for each."""

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        self.channels = [group.channels for group in groups]
        widths = [int(group.unit.max()) + 1 for group in groups]
        starts = torch.tensor([0, *widths]).cumsum(0)
        self.units = int(starts[-1])
        self.unit = torch.cat([group.unit + start for group, start in zip(groups, starts, strict=False)])
        self._one_each = torch.equal(self.unit, torch.arange(self.units))  # channels and units are numbered alike
        self._edges: dict[str, list[tuple[Tensor, Tensor]]] = {}  # layer -> (positions, units) of each group in it
        for group, start in zip(groups, starts, strict=False):
            for edge in group.edges:
                self._edges.setdefault(edge.tap, []).append((edge.index, group.unit[edge.channel] + start))
        self._rows: dict[tuple[object, ...], _Rows] = {}

    def __call__(self, measured: SideBySide, part: int, scale: Tensor | None) -> Tensor:
        """float64 [1, N, ΣU] of `part`, the units of all groups one after another; 0 for those that no tap reached.

        scale: float64 [N], what each sample's are multiplied by.
        """
        taken, lengths = self._rows_of(measured.layers, measured.widths, measured.sums.device)
        rows = measured.sums[part].t()[taken].double()
        s = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)
        return (s if scale is None else s * scale).t()[None]

    def of_channels(self, values: Tensor) -> Tensor:
        """[..., ΣU] -> [..., ΣC], group after group: every channel of a unit gets the unit's."""
        if self._one_each:
            return values
        if self.unit.device != values.device:
            self.unit = self.unit.to(values.device)
        return values[..., self.unit]

    def reads(self, layers: Sequence[str]) -> bool:
        """Whether a group is read by one of these layers."""
        return any(layer in self._edges for layer in layers)

    def _rows_of(self, layers: tuple[str, ...], widths: list[int], device: torch.device) -> _Rows:
        key = (device, *layers)
        if key not in self._rows:
            starts = torch.tensor([0, *widths]).cumsum(0)
            edges = [(index + start, unit) for layer, start in zip(layers, starts, strict=False)
                     for index, unit in self._edges.get(layer, ())]
            column, unit = (torch.cat(parts) for parts in zip(*edges, strict=True))
            order = unit.argsort(stable=True)
            self._rows[key] = _Rows(column[order].to(device), torch.bincount(unit, minlength=self.units).to(device))
        return self._rows[key]


class EdgeSums:
    """s of one group, and Σ g and the mean activation of each of its edges by itself."""

    def __init__(self, group: ChannelGroup) -> None:
        self.group = group
        self.units = int(group.unit.max()) + 1
        self._edges = [(edge.tap, _edge_index(group, edge)) for edge in group.edges]
        self._on: dict[torch.device, tuple[list[tuple[str, _EdgeIndex]], Tensor]] = {}  # the same, and units, elsewhere

    @property
    def too_many(self) -> str | None:
        """Why the products of its edges cannot be kept, where they are too many, each edge read once."""
        edges = sum(where.most for _, where in self._edges)
        return None if (1 + edges) ** 2 * self.units <= _MAX_PRODUCTS else \
            f'ablation="mean" needs the products of its {edges} places with each other, which are too many; ' \
            'ablation="zero" scores it'

    def __call__(self, by_layer: ByLayer, scale: Tensor | None) -> Tensor | None:
        """s, then Σ g, then the mean activation of every edge: float64 [1 + 2E, N, U]; scale: float64 [P, N].

        None where no tap of the group was reached. Raises ValueError for edges whose products would not fit.
        """
        device = next((sums.device for layer, _ in self._edges for sums in by_layer.get(layer, ())), None)
        if device is None:
            return None
        found = {layer: added_up(by_layer[layer], MEAN) for layer, _ in self._edges if by_layer.get(layer)}
        reached = [(found[layer].to(device).double() if scale is None else found[layer].to(device) * scale[:, :, None],
                    where) for layer, where in self._indices(device)[0] if layer in found]
        if (1 + sum(where.most for _, where in reached)) ** 2 * self.units > _MAX_PRODUCTS:
            raise ValueError(f'{self.group.name}: ablation="mean" needs the products of its '
                             f'{sum(where.most for _, where in reached)} places in consumers with each other, which '
                             f'are too many; use ablation="zero", or leave it out with ignore=["{self.group.name}"]')
        s, means, gradients = (torch.cat([self._spread(sums[part], where) for sums, where in reached])
                               for part in (0, MEAN, 2))
        return torch.cat([s.sum(0, keepdim=True), gradients, means])

    def _spread(self, values: Tensor, where: "_EdgeIndex") -> Tensor:
        """[N, C_in] -> [E, N, U]: what several positions of the input hold for the same unit, one after another."""
        spread = values.new_zeros(where.most, self.units, len(values))
        spread[where.rank, where.unit] = values.t()[where.position]
        return spread.transpose(1, 2)

    def of_channels(self, values: Tensor) -> Tensor:
        """[..., U] -> [..., C]: every channel of a unit gets the unit's."""
        return values[..., self._indices(values.device)[1]]

    def _indices(self, device: torch.device) -> tuple[list[tuple[str, "_EdgeIndex"]], Tensor]:
        """The edges and the channels' units on `device`, copied there once: a copy in each pass would be waited for."""
        if device not in self._on:
            self._on[device] = [(layer, where._replace(position=where.position.to(device), unit=where.unit.to(device),
                                                       rank=where.rank.to(device)))
                                for layer, where in self._edges], self.group.unit.to(device)
        return self._on[device]


class _EdgeIndex(NamedTuple):
    """position, unit, rank: int64 [M]: each position that counts, its unit, and how many positions of that unit come
    before it. most: the number of positions of the unit that has most."""

    position: Tensor
    unit: Tensor
    rank: Tensor
    most: int


def _edge_index(group: ChannelGroup, edge: Member) -> _EdgeIndex:
    unit = group.unit[edge.channel]
    order = unit.argsort(stable=True)
    rank = torch.empty_like(unit)
    rank[order] = torch.arange(len(unit)) - torch.searchsorted(unit[order], unit[order])
    return _EdgeIndex(edge.index, unit, rank, int(rank.max()) + 1)


def with_products(graph: ChannelGraph) -> ChannelGraph:
    """The graph less streams that too many layers read for the products of all with each other."""
    reasons = {group.name: reason for group in graph.groups if any(group.role("norm"))
               and (reason := EdgeSums(group).too_many) is not None}
    return replace(graph, groups=tuple(group for group in graph.groups if group.name not in reasons),
                   skipped={**graph.skipped, **reasons})


def check_read(measured: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError for a layer that has no mean where all else [P, N, C] is finite: it read nothing."""
    for layer, sums in measured:
        if sums[MEAN].isnan().any() and torch.isfinite(sums[[0, 2]]).all():
            raise ValueError(f'{layer}: it reads nothing for some samples, so that ablation="mean" has no mean of its '
                             'channels: use ablation="zero"')
