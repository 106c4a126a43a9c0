"""Of two orders in which channels could go, the one that leaves more: by measured groups, or by importances alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastscore.pruning.budgets.costs import Costs, MacsWithout, Resource
from fastscore.pruning.budgets.selection import give_back, select
from fastscore.pruning.options import Budgets
from fastscore.pruning.order.measured import Measured
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.result import PruneResult


def better(found: Measured, order: list[RemovalStep], plain: list[RemovalStep],
           pruned: Callable[[list[RemovalStep]], PruneResult], costs: Costs, budgets: Budgets, by_quality: bool,
           counted: MacsWithout | None, check: Callable[[Mapping[str, Tensor]], object]) -> PruneResult:
    """The result of the order that loses less, both repaired linearly, on samples that have not measured groups.

    order: that of what was measured, `found`; plain: by importances alone. pruned: makes the repaired network of an
    order. costs: whole, before and after. budgets: where a time, or a quality, decides, both are compared at the MACs
    that the measured order needed. counted: counts what remains. check: raises an error that says by which groups a
    network without such channels does not run.
    """

    def removed(order: list[RemovalStep], shares: Mapping[Resource, float]) -> dict[str, Tensor]:
        gone = select(order, costs, shares, counted)
        give_back(gone, costs)
        return gone

    if by_quality or budgets.latency is not None:
        result = pruned(order)
        one, share = result.removed, result.report.macs[1] / result.report.macs[0]
        other = removed(plain, {"macs": share})
    else:
        result, one, other = None, removed(order, budgets.counted), removed(plain, budgets.counted)
    if not one or (one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)):
        return result or pruned(order)
    try:
        measured, alone = found.lost(one, other)
    except Exception:  # of the model's code
        check(one)
        check(other)
        raise
    result = (result or pruned(order)) if measured <= alone else pruned(plain)
    said = (f"{'groups as measured' if measured <= alone else 'importances alone'}: "
            f"repaired linearly, {found.measure} {min(measured, alone):.3g} against {max(measured, alone):.3g} by "
            f"{'importances alone' if measured <= alone else 'groups as measured'}, on samples held out"
            + (" that have not measured groups" if found.has_others else ", the same that measured groups"))
    return replace(result, report=result.report.with_notes(choice=said))
