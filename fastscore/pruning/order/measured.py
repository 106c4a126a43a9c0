"""What the channels of each group are worth once they are repaired: measured, group by group.

What a linear repair gives back differs from channel to channel (see fastscore.pruning.order.redundancy) and from group
to group, and the more of a group goes, the less it is. So a share of each group's channels, those that go first, is
taken out of the dense network alone, the layers that read them are reconstructed, and the KL divergence from the dense
network is measured on samples held out from that. With S the summed values of what went,

    KL ≈ S · exp(a + b · share),

a and b fitted to some shares of the group, is what every prefix of its channels costs; what it grows by from step to
step takes the place of the values.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from fastscore.arguments import check_flag
from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.graph.cutting.surgery import removed_indices
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.modules.inspection import device_of
from fastscore.modules.refused_batches import naming_argument
from fastscore.progress import bar
from fastscore.pruning.options import Scope
from fastscore.pruning.order import redundancy
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.surgery import Surgery
from fastscore.recovery.calibration import Calibration
from fastscore.recovery.compensation import has_no_place, mean_contributions, removed_positions
from fastscore.recovery.decisions import Decisions, JudgedOutputs
from fastscore.recovery.divergence import divergence, names
from fastscore.recovery.linear import estimate_inputs, rewired
from fastscore.recovery.moments import InputMoments, layouts
from fastscore.recovery.reconstruct import Method
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.scoring.scores import Scores

SHARES = (0.25, 0.5, 0.75)
SAMPLES = 50  # of those held out, as many judge
RIDGE = 0.01
LIMITS = 1e-4, 10.0  # of KL / S

Curves = Mapping[str, tuple[float, float]]  # group -> (a, b)
Ranked = Callable[[Mapping[str, Tensor]], list[RemovalStep]]


def measurable(scores: Scores) -> bool:
    """Whether importances are changes of the outputs, and add up: those that read gradients and have no sign."""
    origin = scores.origin
    return (origin.units, origin.layerwise) == ("groups", "none") and origin.gradient != "none" and \
        all(bool((values >= 0).all()) for values in scores.values())


def is_measured(asked: bool | None, scores: Scores, scope: Scope, calibration: object, repair: Method) -> bool:
    """Whether prune() measures groups. Raises ValueError where it is to and cannot, TypeError for no bool."""
    check_flag("measured", asked)
    possible = calibration is not None and scope == "global" and measurable(scores)
    if asked and not possible:
        raise ValueError('measured: it takes calibration=batches, scope="global", and scores of channels (units='
                         '"groups") without a sign that read gradients (taylor-sq, taylor-abs): give them, or leave '
                         "measured= out")
    return possible and repair in ("auto", "asymmetric") if asked is None else asked


class Measured:
    """What groups cost, and the `order` in which their channels go by that; `measure` says what `lost` tells: KL or
    error.

    ranked: the steps by given values; scores: importances; channel_costs: as for removal_order. batches: to fit on, and
    one of four samples to judge by: see fastscore.reconstruct. A half of these at most measures the groups; the rest
    tells the order from another. They are told what the dense layers read. outputs: those that are judged, see
    Decisions. process_group: processes that share the work. Raises ValueError for batches that the model cannot take.
    """

    def __init__(self, model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, scores: Scores, ranked: Ranked,
                 channel_costs: Mapping[str, Tensor] | None, batches: RememberingBatches, forward: Forward,
                 outputs: JudgedOutputs, process_group: distributed.ProcessGroup | None) -> None:
        self._model, self._eval_model, self._groups, self._forward = model, eval_model, graph.groups, forward
        self._run, self._group, self.measure = Decisions(forward, outputs), process_group, "KL"
        calibration = self._calibration = Calibration(batches, device_of(model), forward, process_group,
                                                       batches.name)
        with torch.no_grad():
            self._example = calibration.first()
            every = {group.name: torch.arange(group.channels) for group in graph.groups}
            names = [name for name in removed_positions(tuple(graph.groups), every)
                     if not has_no_place(model, name, graph.kept_biases)]
            index = layouts(eval_model, graph.groups, names)
            with InputMoments(eval_model, index) as self._inputs:
                for batch in calibration.part("fit"):
                    self._inputs.start(batch)
                    with naming_argument(f"{batches.name}: the model cannot take its batches", eval_model, forward,
                                         batch):
                        forward(eval_model, batch)
            self._inputs.finish(process_group)
            self._read = {name: moments for name, moments in self._inputs.moments.items() if moments.count}
            batches.moments["fit"].update(self._read)  # the same in every process, whatever batches it had
            values = {}
            scored = [group for group in graph.groups if group.name in scores]
            with bar("ordering channels", " groups", len(scored)) as done:
                for group in scored:
                    values[group.name] = redundancy.values(eval_model, group, scores[group.name], self._inputs.moments,
                                                           graph.normalized_by)
                    done.update()
            order = ranked(values)
            self._measuring = max(1, min(-(-SAMPLES // calibration.counted_in), calibration.held_out // 2))
            curves = self._measured(_trials(graph.groups, values, order), index)
        self.order = reordered(order, graph.groups, values, curves, channel_costs)

    def _measured(self, trials: Sequence[tuple[ChannelGroup, Tensor, float, float]], index: Mapping[str, Any]
                  ) -> dict[str, tuple[float, float]]:
        measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
        judges = list(self._calibration.some(0, self._measuring))
        with InputMoments(self._eval_model, index) as looked_at:  # which names what a sample alone would break
            dense = []
            for batch in judges:
                looked_at.start(batch)
                dense.append(self._run(self._eval_model, batch))
        with bar("measuring groups", " cuts", len(trials)) as done:
            for group, gone, share, value in trials:
                small = self._repaired({group.name: gone}, RIDGE)
                kl = self._far(dense, small, judges)
                if kl is not None:
                    measured[group.name].append((share, kl / value))
                done.update()
        unit = 1.0  # nats; of values, errors and importances may be in any units
        if self._run.errors and measured:
            finite = [ratio for points in measured.values() for _, ratio in points if math.isfinite(ratio)]
            unit = float(np.median(finite or [1.0])) or 1.0
        return {name: _line([(share, ratio / unit) for share, ratio in points]) for name, points in measured.items()}

    def _far(self, dense: Sequence[Mapping[str, Tensor]], small: nn.Module, judges: Sequence[Batch]) -> float | None:
        """The KL, or error, of a smaller model; None where it does not run, at a width that prune() then leaves out."""
        try:
            return divergence(dense, (self._run(small, batch) for batch in judges), self._group, self._run.errors).kl
        except FloatingPointError:
            raise
        except Exception:  # of the model's code: where it raises in one process, it does in all (see divergence)
            return None

    def _repaired(self, removed: Mapping[str, Tensor], ridge: float) -> nn.Module:
        """The model without `removed` (group -> channels), repaired linearly."""
        groups = [group for group in self._groups if group.name in removed]
        found = {name: estimate_inputs(self._read[name], where, ridge)
                 for name, where in removed_positions(tuple(groups), removed).items() if name in self._read}
        weights = {name: rewired(self._eval_model.get_submodule(name), x) for name, x in found.items()}
        constants = {name: x.constant for name, x in found.items()}
        added = mean_contributions(self._eval_model, constants, self._example, self._forward)
        return Surgery(self._model, removed_indices(groups, removed), added, weights).copy().eval()

    @torch.no_grad()
    def lost(self, *choices: Mapping[str, Tensor]) -> list[float]:
        """The KL, or error, that each choice of channels (group -> those that go) leaves once it is repaired linearly,
        or by means where that is better, on samples held out from the fit that have not measured groups."""
        first = self._measuring if self.has_others else 0
        dense = [{name: output.cpu() for name, output in self._run(self._eval_model, batch).items()}
                 for batch in self._calibration.some(first)]

        def left(removed: Mapping[str, Tensor], ridge: float) -> float:
            small = self._repaired(removed, ridge)
            far = divergence(dense, (self._run(small, batch) for batch in self._calibration.some(first)), self._group,
                             self._run.errors)
            self.measure = names(far.by_error, far.mixed)[1]
            return far.kl

        return [min(left(removed, ridge) for ridge in (RIDGE, math.inf)) for removed in choices]

    @property
    def has_others(self) -> bool:
        """Whether samples are held out that have not measured groups."""
        return self._calibration.held_out > self._measuring


def _trials(groups: Sequence[ChannelGroup], values: Mapping[str, Tensor], order: Sequence[RemovalStep]
            ) -> list[tuple[ChannelGroup, Tensor, float, float]]:
    """(group, the first channels of it to go, their share, their summed values): what is tried."""
    found = []
    for group in groups:
        gone: list[int] = []
        shares = list(SHARES)
        for step in (step for step in order if step.group == group.name):
            gone += step.channels
            if shares and len(gone) >= shares[0] * group.channels:
                index = torch.tensor(sorted(gone))
                value = float(values[group.name][index].double().sum())
                if value > 0:
                    found.append((group, index, len(gone) / group.channels, value))
                shares = [share for share in shares if share * group.channels > len(gone)]
    return found


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), b >= 0, of exp(a + b·share) through (share, ratio), by least squares of the logarithms."""
    shares = np.array([share for share, _ in points])
    logs = np.log(np.clip(np.nan_to_num([ratio for _, ratio in points], nan=LIMITS[1]), *LIMITS))
    off = shares - shares.mean()
    slope = max(float(off @ logs) / float(off @ off), 0.0) if len(points) > 1 and off.any() else 0.0
    return float(logs.mean() - slope * shares.mean()), slope


def reordered(order: Sequence[RemovalStep], groups: Iterable[ChannelGroup], values: Mapping[str, Tensor],
              curves: Curves, channel_costs: Mapping[str, Tensor] | None) -> list[RemovalStep]:
    """The steps by what was measured; the steps of a group keep their order.

    values: of the groups' channels. channel_costs: as for removal_order. Groups in which nothing could be measured have
    the others' mean.
    """
    if not curves:
        return list(order)
    usual = tuple(float(np.mean([curve[i] for curve in curves.values()])) for i in range(2))
    widths = {group.name: group.channels for group in groups}
    gone, summed, before, below = (defaultdict[str, float](float) for _ in range(4))
    found = []
    for step in order:
        name, index = step.group, torch.tensor(step.channels)
        a, b = curves.get(name, usual)
        gone[name] += len(step.channels)
        summed[name] += float(values[name][index].double().sum())
        kl = float(np.exp(a + b * gone[name] / widths[name])) * summed[name]
        cost = float(len(index) if channel_costs is None else channel_costs[name][index].sum())
        value = (kl - before[name]) / cost if cost > 0 else float("inf")
        before[name] = kl
        below[name] = max(below[name], value)
        found.append(replace(step, value=below[name]))
    return sorted(found, key=lambda step: step.value)
