"""Where the step that meets a budget is a branch or an expert, finer steps of the order in its place."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastscore.pruning.budgets.costs import Costs, Resource
from fastscore.pruning.order.ranking import RemovalStep

_COARSE = 0.02  # of the dense cost: a branch that goes further below the budget than that is a coarse step


def over(costs: Costs, budgets: Mapping[Resource, float]) -> list[Resource]:
    """The budgets that do not hold."""
    return [unit for unit, share in budgets.items() if costs.totals[unit] > share * costs.dense[unit] * (1 + 1e-12)]


def above(costs: Costs, budgets: Mapping[Resource, float]) -> float:
    """How far what remains is above the budget that it keeps least, as a share of the dense cost; below 0, under it."""
    return max(costs.totals[unit] / max(costs.dense[unit], 1) - share for unit, share in budgets.items())


def with_finer_steps(steps: Sequence[RemovalStep], needed: int, costs: Costs,
                     budgets: Mapping[Resource, float]) -> list[RemovalStep]:
    """The steps that go: the first `needed`, of which the last meets the budgets. Where that one is coarse, and goes
    further below them than all that the next finer steps would take in its place, it stays, and they go; likewise of
    these the last. (To come nearer to a budget is not enough: what follows is more important, and there may be much.)

    costs: without the first `needed`; without those returned afterwards.
    """
    best = list(steps[:needed])
    below = -above(costs, budgets)
    if not best or not best[-1].whole or below <= _COARSE:
        return best
    before = _undone(best[-1], costs, budgets)  # how far above the budget it is without the last of the best
    taken, stuck = best[:-1], set(best[-1].groups)
    for step in steps[needed:]:
        if not best[-1].whole or below <= max(before, _COARSE):  # what stands in its place takes `before` at least
            break
        if not stuck.isdisjoint(step.groups):  # of a group, nothing goes before what stays
            continue
        step.remove(costs)
        now = above(costs, budgets)
        better = before - now < below
        if over(costs, budgets):
            taken.append(step)
            if not better:
                break
            continue
        without = _undone(step, costs, budgets)
        stuck.update(step.groups)
        if better:
            best, below, before = [*taken, step], -now, without
    going, gone = set(best), set(taken)
    for step in taken:
        if step not in going:
            step.restore(costs)
    for step in best:
        if step not in gone:
            step.remove(costs)
    return best


def in_place_of_last(steps: Sequence[RemovalStep], needed: int) -> list[RemovalStep]:
    """The order in which the last of the first `needed` steps stays, a branch or an expert, and so do all others that
    follow: what else follows goes in its place, less that of a group of which something stays before."""
    order, stuck = list(steps[:needed - 1]), set(steps[needed - 1].groups)
    for step in steps[needed:]:
        if step.whole or not stuck.isdisjoint(step.groups):
            stuck.update(step.groups)
        else:
            order.append(step)
    return order


def say_coarse(order: Sequence[RemovalStep], removed: Mapping[str, Tensor], costs: Costs,
               budgets: Mapping[Resource, float]) -> str:
    """Which coarse steps stayed although their turn had come; why what remains is far below a budget; or nothing.

    removed: what went, group -> int64 [R]. costs: without it, and so again afterwards.
    """
    if not removed or not budgets:
        return ""
    gone = {name: set(channels.tolist()) for name, channels in removed.items()}
    went = [all(gone.get(group, set()).issuperset(channels) for group, channels in step.parts) for step in order]
    last = max((number for number, each in enumerate(went) if each), default=-1)
    totals, stuck, said = dict(costs.totals), set[str](), []
    now = above(costs, budgets)
    for step, each in zip(order[:last], went, strict=False):
        if each or not step.whole or not stuck.isdisjoint(step.groups):
            continue
        stuck.update(step.groups)
        step.remove(costs)
        if above(costs, budgets) < min(now, 0) - _COARSE:
            said.append(f"{step.group}{' and what goes with it' if step.beside else ''} ({_remains(costs, budgets)})")
        _undone(step, costs, budgets)
        costs.totals.update(totals)
    notes = ["their turn had come, and they stay, as far less than the budget would remain without them: "
             f"{', '.join(said[:3])}{f' and {len(said) - 3} more' if said[3:] else ''}"] if said else []
    if above(costs, budgets) < -_COARSE and any(step.whole for step, each in zip(order, went, strict=True) if each):
        notes.append(f"{_remains(costs, budgets)}: each branch or expert that went is larger than what lies "
                     "between, and finer steps in place of the last would take more than that, or do not reach it")
    return "; ".join(notes)


def _remains(costs: Costs, budgets: Mapping[Resource, float]) -> str:
    left = {unit: costs.totals[unit] / max(costs.dense[unit], 1) for unit in budgets}
    unit = max(left, key=lambda each: left[each] - budgets[each])
    return f"{left[unit]:.1%} of the {unit} where {budgets[unit]:.1%} may remain"


def _undone(step: RemovalStep, costs: Costs, budgets: Mapping[Resource, float]) -> float:
    step.restore(costs)
    return above(costs, budgets)
