"""What the channels of each group are worth once they are repaired: measured, group by group.

What a linear repair gives back differs from channel to channel (see fastscore.pruning.order.redundancy) and from group
to group, and the more of a group goes, the less it is. So a share of each group's channels, those that go first, is
taken out of the dense network alone, the layers that read them are reconstructed, and the KL divergence from the dense
network is measured on samples held out from that. With S the summed values of what went,

    KL ≈ S · exp(a + b · share),

a and b fitted to some shares of the group, is what every prefix of its channels costs; what it grows by from step to
step takes the place of the values.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, distributed, nn

from fastscore.batches import Batch, Forward, checked_forward
from fastscore.graph.cutting.surgery import removed_indices
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.modules.inspection import device_of
from fastscore.progress import bar
from fastscore.pruning.order import redundancy
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.surgery import Surgery
from fastscore.recovery.calibration import Calibration
from fastscore.recovery.compensation import has_no_place, mean_contributions, removed_positions
from fastscore.recovery.divergence import divergence
from fastscore.recovery.linear import estimate_inputs, rewired
from fastscore.recovery.moments import InputMoments, layouts
from fastscore.scoring.scores import Scores

SHARES = (0.25, 0.5, 0.75)
SAMPLES = 48  # of those held out, as many judge
RIDGE = 0.01
LIMITS = 1e-4, 10.0  # of KL / S

Curves = Mapping[str, tuple[float, float]]  # group -> (a, b)
Ranked = Callable[[Mapping[str, Tensor]], list[RemovalStep]]


def measurable(scores: Scores) -> bool:
    """Whether importances are changes of the outputs, and add up: those that read gradients and have no sign."""
    origin = scores.origin
    return (origin.units, origin.layerwise) == ("groups", "none") and origin.gradient != "none" and \
        all(bool((values >= 0).all()) for values in scores.values())


def measured_order(model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, scores: Scores, ranked: Ranked,
                   channel_costs: Mapping[str, Tensor] | None, batches: Iterable[Batch], forward: Forward,
                   process_group: distributed.ProcessGroup | None) -> list[RemovalStep]:
    """The steps in which channels go, by what was measured.

    Args:
        model: the dense model; it stays as it is.
        eval_model: an evaluation copy of it.
        graph: of the model.
        scores: their importances.
        ranked: the steps by given values.
        channel_costs: as for removal_order.
        batches: to fit on, and one of four samples to judge by: see fastscore.reconstruct.
        forward: how the model is called.
        process_group: processes that share the work.

    Raises:
        ValueError: batches that the model cannot take.
    """
    calibration = Calibration(batches, device_of(model), forward, process_group)
    run, groups = checked_forward(forward), graph.groups
    measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with torch.no_grad():
        example = calibration.first()
        every = {group.name: torch.arange(group.channels) for group in groups}
        names = [name for name in removed_positions(tuple(groups), every) if not has_no_place(model, name)]
        index = layouts(eval_model, groups, names)
        try:
            with InputMoments(eval_model, index) as inputs:
                for batch in calibration.part("fit"):
                    inputs.start(batch)
                    forward(eval_model, batch)
        except RuntimeError as error:
            raise ValueError(f"calibration: the model cannot take its batches ({error}); give what the model takes, or "
                             "forward=") from error
        inputs.finish(process_group)
        values = {group.name: redundancy.values(eval_model, group, scores[group.name], inputs.moments,
                                                graph.normalized_by) for group in groups if group.name in scores}
        order = ranked(values)
        trials = _trials(groups, values, order)
        limit = -(-4 * SAMPLES // calibration.size)
        judges = [batch for number, batch in calibration.numbered("held out") if number < limit]
        with InputMoments(eval_model, index) as looked_at:  # which names what a sample alone would break
            dense = []
            for batch in judges:
                looked_at.start(batch)
                dense.append(run(eval_model, batch))
        with bar("measuring groups", " cuts", len(trials)) as done:
            for group, gone, share, value in trials:
                removed = {group.name: gone}
                found = {name: estimate_inputs(inputs.moments[name], where, RIDGE)
                         for name, where in removed_positions((group,), removed).items() if name in inputs.calls}
                weights = {name: rewired(eval_model.get_submodule(name), x) for name, x in found.items()}
                constants = {name: x.constant for name, x in found.items()}
                added = mean_contributions(eval_model, constants, example, forward)
                small = Surgery(model, removed_indices((group,), removed), added, weights).copy().eval()
                kl = divergence(dense, (run(small, batch) for batch in judges), process_group).kl
                measured[group.name].append((share, kl / value))
                done.update()
    return reordered(order, groups, values, {name: _line(points) for name, points in measured.items()}, channel_costs)


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
