"""What prune() did, in figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.pruning.budgets.costs import Costs
from fastscore.recovery.compensation import removed_positions
from fastscore.recovery.divergence import Mixed, judged_by, mixed_of, names
from fastscore.recovery.repairs import Repair
from fastscore.scoring.row_notes import row_notes
from fastscore.tables import Table
from fastscore.wording import and_like_it, and_more_layers, counted

UNSTEADY = 0.05  # uncertainty of a share of the time, above which the report warns
FEW = 0.05  # of a group's channels: where fewer are left, the report says so


@dataclass(frozen=True)
class GroupReport:
    """One group, (before, after).

    Attributes:
        layer: its name.
        channels: of the group; after, none where the branch that made them is gone.
        macs, params: of the layers that make its channels or work on each of them, MACs for one sample.
        heads: of an attention whose heads go whole; None of other groups.
    """

    layer: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]
    heads: tuple[int, int] | None = None

    @property
    def remark(self) -> str:
        """What is to be said of its figures; empty where nothing is."""
        narrower = self.channels[0] == self.channels[1] and self.macs[1] < self.macs[0]
        return self.in_heads or ("its layers read fewer channels" if narrower else "")

    @property
    def in_heads(self) -> str:
        """What of the channels went as heads, and what as dimensions of those that stay; empty without heads."""
        if self.heads is None:
            return ""
        left = self.heads[1] if self.channels[1] else 0  # none of a branch that is gone
        before, after = (f"{channels / heads:.3g}" if heads else "0"
                         for channels, heads in zip(self.channels, (self.heads[0], left), strict=True))
        widths = f" of {before} dimensions" if before == after or not left else \
            f", of {before} → {after} dimensions each"
        return f"{self.heads[0]} → {left} heads{widths}"


@dataclass(frozen=True)
class Timing:
    """The time of one call of the dense and of the smaller model, which took turns.

    Attributes:
        seconds: their medians.
        uncertainty: of the share, for 95 % of such measurements.
        clock: what ran them: "torch", "onnxruntime" or "openvino".
    """

    seconds: tuple[float, float]
    uncertainty: float
    clock: str = "torch"

    @property
    def share(self) -> float:
        """What remains of the dense model's time."""
        return self.seconds[1] / self.seconds[0]


@dataclass(frozen=True)
class Candidate:
    """A model that a search in measured time tried.

    Attributes:
        channels, params, macs: shares that remain.
        timing: what was measured.
        chosen: whether it is the one that prune() returned.
    """

    channels: float
    params: float
    macs: float
    timing: Timing
    chosen: bool


@dataclass(frozen=True)
class Judged:
    """A repaired model that a search for a quality budget tried.

    Attributes:
        macs: the share that remains.
        agreement, kl: with the dense model and from it, on samples that no repair has seen.
        bound: what was held against the agreement asked for: the agreement found, or the least that it says of others.
        decisions: how many were compared.
        chosen: whether it is the one that prune() returned.
        by_error, mixed: as in fastscore.recovery.divergence.Divergence.
        samples: that judged.
    """

    macs: float
    agreement: float
    kl: float
    bound: float
    decisions: int
    chosen: bool
    by_error: bool = False
    mixed: Mixed = ""
    samples: int = 0

    @property
    def least(self) -> str:
        """The bound, where that is less than the agreement found; else empty."""
        return "" if self.bound == self.agreement else f" (at least {self.bound:.1%})"

    def __str__(self) -> str:
        agreement, kl = names(self.by_error, self.mixed)
        rests_on = f", {counted(self.decisions, 'decision')}" if self.decisions and self.mixed != "error" else ""
        return (f"{'chosen' if self.chosen else 'tried'}: {self.macs:.1%} of the MACs: "
                f"{agreement} {self.agreement:.1%}{self.least}, {kl} {self.kl:.3g}{rests_on}")


@dataclass(frozen=True)
class PruneReport(Table):
    """What prune() did. Pairs are (before, after).

    Attributes:
        groups: each group of channels.
        channels: that can go.
        macs: of one sample.
        params: parameters.
        skipped: layer -> why its channels were kept.
        candidates: with a latency budget, what was measured, from the largest to the smallest.
        notes: what the scores say of where they come from.
        uncounted: operation that no formula knows -> the modules that it runs in; its MACs are in none of the figures.
        repairs: with calibration batches, how far from the dense model the cut and each repair left the smaller one.
        judged: with a quality budget, the models that were judged, from the largest to the smallest.
        compensation: without calibration batches, what stands in for the channels that went.
        decided: what agreement and KL are of.
        row_notes: what rows of groups stand for, where that is not plain.
    """

    groups: tuple[GroupReport, ...]
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]
    skipped: Mapping[str, str]
    candidates: tuple[Candidate, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    judged: tuple[Judged, ...] = ()
    uncounted: Mapping[str, str] = field(default_factory=dict)
    compensation: str = ""
    decided: str = ""
    row_notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "PruneReport":
        """The report of which dataclasses.asdict and JSON made `data`."""
        groups = (GroupReport(row["layer"], _pair(row["channels"]), _pair(row["macs"]), _pair(row["params"]),
                              _pair(row["heads"]) if row.get("heads") else None)
                  for row in data["groups"])
        timings = (Timing(**{**row["timing"], "seconds": _pair(row["timing"]["seconds"])})
                   for row in data["candidates"])
        candidates = (Candidate(**{**row, "timing": timing})
                      for row, timing in zip(data["candidates"], timings, strict=True))
        return cls(tuple(groups), _pair(data["channels"]), _pair(data["macs"]), _pair(data["params"]), data["skipped"],
                   tuple(candidates), data.get("notes", {}), tuple(map(_repair, data.get("repairs", ()))),
                   tuple(Judged(**row) for row in data.get("judged", ())), data.get("uncounted", {}),
                   data.get("compensation", ""), data.get("decided", ""), tuple(data.get("row_notes", ())))

    @property
    def kept_notes(self) -> dict[str, str]:
        """What a file of the model says of it: the notes, what remains, the repair that was chosen, and how a quality
        budget was held."""
        repair = [str(row).removeprefix("chosen: ") for row in self.repairs if row.chosen]
        if self.held is not None:  # its figures, and not those by which repairs were told apart on fewer samples
            repair = [row.how for row in self.repairs if row.chosen]
        found = {"remains": [self._remains.removeprefix("remains: ")], "repair": repair,
                 "judged": [] if self.held is None else [str(self.held).removeprefix("chosen: ")]}
        return {**self.notes, **{name: said[0] for name, said in found.items() if said}}

    @property
    def held(self) -> Judged | None:
        """With a quality budget, the model that prune() returned, as it was judged; None where nothing could go."""
        return next((row for row in self.judged if row.chosen), None)

    def with_notes(self, **notes: str) -> "PruneReport":
        """This report with more notes, those that say something."""
        return replace(self, notes={**self.notes, **{name: text for name, text in notes.items() if text}})

    def records(self) -> list[dict[str, Any]]:
        """A row for each group of channels: what there was, and what remains."""
        return [{"layer": row.layer} | {f"{unit}_{when}": value for unit in ("channels", "macs", "params")
                                        for when, value in zip(("before", "after"), getattr(row, unit), strict=True)}
                for row in self.groups]

    def __repr__(self) -> str:
        return f"<PruneReport: {self._remains}>"

    @property
    def _remains(self) -> str:
        return "remains: " + ", ".join(f"{after / before if before else 1:.1%} of the {unit}"
                                       for unit, (before, after) in
                                       (("channels", self.channels), ("MACs", self.macs), ("parameters", self.params)))

    def __str__(self) -> str:
        width = max([len("group"), *(len(row.layer) for row in self.groups)])
        lines = [f"{'group':<{width}} {'channels':>14} {'MACs':>25} {'parameters':>23}"]
        rows = [(row.layer, row.channels, row.macs, row.params, row.remark) for row in self.groups]
        for layer, channels, macs, params, heads in [*rows, ("model", self.channels, self.macs, self.params, "")]:
            lines.append(f"{layer:<{width}} {channels[0]:>6} → {channels[1]:<5} {macs[0]:>11,} → {macs[1]:<11,} "
                         f"{params[0]:>10,} → {params[1]:<10,}{heads and f' {heads}'}")
        return "\n".join([*lines, *self._remarks])

    @property
    def _remarks(self) -> list[str]:
        """What remains of the whole, what was tried, what was kept and why, and where the scores come from."""
        lines = [self._remains, "a row is a group, the channels that go together, under the name of the first layer "
                 "that makes them", *self.row_notes,
                 *([self.compensation] if self.compensation and not self.repairs else [])]
        for tried in self.candidates:
            dense, small = (1e3 * seconds for seconds in tried.timing.seconds)
            lines.append(f"{'chosen' if tried.chosen else 'tried'}: {tried.timing.share:.1%} "
                         f"(± {tried.timing.uncertainty:.1%}) of the time, {dense:.3g} → {small:.3g} ms, "
                         f"with {tried.channels:.1%} of the channels, "
                         f"{tried.macs:.1%} of the MACs"
                         + ("" if tried.timing.clock == "torch" else f", by {tried.timing.clock}"))
        lines += ["the clock was unsteady: measured again, the share may be another by "
                  f"{tried.timing.uncertainty:.0%} of the dense model's time; time on a machine that does nothing else"
                  for tried in self.candidates
                  if tried.chosen and tried.timing.uncertainty > UNSTEADY]
        if self.judged:
            fewest, mixed = min(row.decisions for row in self.judged), mixed_of(row.mixed for row in self.judged)
            bounded = any(row.least for row in self.judged)
            lines.append(f"networks, {judged_by(fewest, 'no repair has seen', mixed, bounded)}")
        lines += map(str, self.judged)
        first = self.repairs[0] if self.repairs else None
        if first and (first.decisions or first.by_error):  # a report of an older file does not say
            mixed = mixed_of(row.mixed for row in self.repairs)
            by = names(first.by_error, mixed)[1]
            lines.append(f"repairs, {judged_by(first.decisions, 'they are not fitted to', mixed)}; chosen by {by}")
        lines += map(str, self.repairs)
        lines += [f"outputs: {self.decided}"] if self.decided else []
        lines += [f"{row.layer}: {row.channels[1]} of {row.channels[0]} channels left; floor= keeps a share of each "
                  "group" for row in self.groups if 0 < row.channels[1] < FEW * row.channels[0]]
        lines += [f"{layer}: kept ({reason})" for layer, reason in self.skipped.items()]
        lines += [f"MACs: without those of {operation}, which no formula counts, in {places}"
                  for operation, places in self.uncounted.items()]
        return lines + [f"{name}: {text}" for name, text in self.notes.items()]


def new_report(graph: ChannelGraph, dense: Sequence[tuple[float, float]], costs: Costs, macs: int, pruned: nn.Module,
               removed: Mapping[str, Tensor], candidates: tuple[Candidate, ...], notes: Mapping[str, str],
               compensation: str, units: str, made_plain: Sequence[str] = (), of_own_class: Sequence[str] = ()
               ) -> PruneReport:
    """The report of `pruned`, which has lost `removed` (group -> int64 [R]).

    dense: (MACs, parameters) of each group as it was, see Costs.by_group. costs: without what was removed. macs: of
    `pruned`, counted. compensation: what stands in for what was removed. units: that were scored. made_plain: layers
    that computed their weight and hold it now, and those, of_own_class, that are PyTorch's layers now.
    """
    gone = costs.with_others(removed)
    rows = tuple(GroupReport(group.name, (group.channels, costs.channels_left(group.name)),
                             (round(was[0]), round(now[0])), (round(was[1]), round(now[1])), _heads(group, gone))
                 for group, was, now in zip(graph.groups, dense, costs.by_group(), strict=True))
    params = sum(parameter.numel() for parameter in pruned.parameters())
    if of_own_class:
        notes = {**notes, "layers": f"{and_like_it(of_own_class)} was of a class of its own that computes what a "
                                    "layer of PyTorch does, and lost channels: it is that layer now"}
    if computing := [name for name in made_plain if name not in of_own_class]:
        notes = {**notes, "weights": f"{and_like_it(computing)} computed its weight from its parameters, and lost "
                                     "channels: it holds that weight now, and training goes on without the computation "
                                     "and what it held the weight to (a mask, a norm)"}
    reads = removed_positions(graph.groups, removed)
    if kept := [name for name in graph.kept_biases if name in reads]:
        why = graph.kept_biases[kept[0]]
        notes = {**notes, "biases": f"{and_more_layers(kept)} {why}: it stays as it is, and what "
                                    "went of what is read there is neither compensated nor reconstructed"}
    return PruneReport(rows, (int(costs.dense["channels"]), int(costs.totals["channels"])),
                       (int(costs.dense["macs"]), macs), (int(costs.dense["params"]), params), graph.skipped,
                       candidates, notes=dict(notes), uncounted=costs.uncounted, compensation=compensation,
                       row_notes=row_notes(units, {group.name: group.channels for group in graph.groups}))


def _heads(group: ChannelGroup, removed: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(before, after) heads of an attention, of which one is gone where all its channels are."""
    held = next(group.role("heads"), None)
    if held is None or not len(held.channel):
        return None
    stays = torch.ones(group.channels, dtype=torch.bool)
    stays[removed.get(group.name, torch.empty(0, dtype=torch.int64))] = False
    left = torch.isin(group.unit[held.channel], group.unit[stays])
    return len(left), int(left.sum())


def _repair(row: Mapping[str, Any]) -> Repair:
    return Repair(**{**row, "outputs": {name: _pair(pair) for name, pair in row.get("outputs", {}).items()}})


def _pair(values: Any) -> tuple[Any, Any]:
    before, after = values
    return before, after
