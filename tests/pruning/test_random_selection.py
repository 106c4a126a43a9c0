"""Budgets, against the rules by hand, on groups, costs and networks drawn at random."""

import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_costs import Prices, group, made_up, removed
from torch import Tensor, nn

import fastscore
from fastscore.pruning.budgets.finer_steps import with_finer_steps
from fastscore.pruning.budgets.selection import channels_of, select
from fastscore.pruning.order.ranking import RemovalStep, removal_order

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
VALUES = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 0.5])
ROWS = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=4)


@QUICK
@given(ROWS, st.integers(1, 100), st.sampled_from(["global", "layer", "isomorphic"]), st.integers(1, 4),
       st.sampled_from([0.0, 0.25, 0.5]), st.lists(st.integers(1, 9), min_size=4, max_size=4),
       st.sampled_from(["channels", "params", "macs"]))
def test_any_budget_is_met_from_below_by_less_than_a_step(rows: list[list[float]], percent: int, scope: str,
                                                          round_to: int, floor: float, prices: list[int],
                                                          unit: str) -> None:
    names = "abcd"[:len(rows)]
    groups = tuple(group(name, len(row)) for name, row in zip(names, rows, strict=True))
    costs = Prices(**{name: (len(row), price) for name, row, price in zip(names, rows, prices, strict=False)})
    steps = removal_order(groups, made_up(**dict(zip(names, rows, strict=True))), scope, round_to, floor, {})  # type: ignore[arg-type]
    share = percent / 100
    try:
        gone = removed(steps, costs, **{unit: share})
    except ValueError as error:
        assert "cannot be reached" in str(error)  # noqa: PT017
        assert sum(len(step.channels) * (1 if unit == "channels" else costs.price[step.group]) for step in steps) < \
            (1 - share) * costs.dense[unit]
        return
    assert costs.totals[unit] <= share * costs.dense[unit] * (1 + 1e-9)
    for name, row in zip(names, rows, strict=True):
        kept = len(row) - len(gone.get(name, ()))
        assert kept >= max(1, floor * len(row))
        assert kept == len(row) or kept % round_to == 0
        if scope == "global" and round_to == 1:
            worst = max((row[c] for c in gone.get(name, ())), default=-1)
            assert all(row[c] >= worst for c in set(range(len(row))) - set(gone.get(name, ())))
    last = {step.group: step for step in steps if set(step.channels) <= set(gone.get(step.group, ()))}
    for step in last.values():  # no last step of any group could have stayed
        for name, channels in step.parts:
            costs.restore(name, channels)
        assert costs.totals[unit] > share * costs.dense[unit]
        for name, channels in step.parts:
            costs.remove(name, channels)
    if scope == "layer" and len({len(row) for row in rows}) == 1:  # layers of equal width stay equally wide
        assert len({len(gone.get(name, ())) for name in names}) == 1


@QUICK
@given(st.lists(st.integers(1, 40), min_size=2, max_size=7), st.integers(0, 100), st.integers(1, 30))
def test_finer_steps_stand_in_for_a_coarse_one(sizes: list[int], percent: int, whole: int) -> None:
    """Against the rule by hand: of the steps that meet a budget, each is tried when those before it have stayed;
    it gives way to what follows where it goes further below the budget than all of that takes, and 2 % at least."""
    steps = [RemovalStep(f"g{number}", (0,), number, whole=True) for number in range(len(sizes))]
    costs = Prices(**{f"g{number}": (1, size) for number, size in enumerate(sizes)}, rest=(1, whole))
    total, limit = sum(sizes) + whole, percent / 100 * (sum(sizes) + whole)
    left, stays, found = float(total), [], []  # found: (what went, what remains, what did before its last)
    for number, size in enumerate(sizes):
        if left - size > limit:
            left -= size
            continue
        found.append(([each for each in range(number + 1) if each not in stays], left - size, left))
        stays.append(number)
    if not found or limit >= total:
        return
    best = found[0]
    for other in found[1:]:
        if limit - best[1] > max(0.02 * total, best[2] - other[1]):
            best = other
    first = steps[:len(found[0][0])]
    for step in first:
        costs.remove(step.group, step.channels)
    taken = with_finer_steps(steps, len(first), costs, {"params": percent / 100})  # type: ignore[arg-type]
    assert [step.value for step in taken] == best[0]
    assert costs.totals["params"] == best[1]


@QUICK
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.data())
def test_a_budget_holds_for_the_macs_that_run_whatever_was_foreseen(widths: list[int], data: st.DataObject) -> None:
    """The MACs that run are a polynomial of the widths, of which Prices know nothing."""
    names = "abc"[:len(widths)]
    draw = data.draw
    linear = [draw(st.integers(0, 30)) for _ in widths]
    square = [draw(st.integers(0, 5)) for _ in widths]
    joint, fixed = draw(st.integers(0, 5)), draw(st.integers(1, 60))

    def runs(left: Sequence[int]) -> int:
        each = sum(a * w + b * w * w for a, b, w in zip(linear, square, left, strict=True))
        return fixed + each + joint * math.prod(left)

    def without(gone: dict[str, Tensor]) -> int:
        return runs([width - len(gone.get(name, ())) for name, width in zip(names, widths, strict=True)])

    costs = Prices(**{name: (width, draw(st.integers(0, 9))) for name, width in zip(names, widths, strict=True)})
    costs.totals["macs"] = costs.dense["macs"] = runs(widths)
    order = removal_order(tuple(group(name, width) for name, width in zip(names, widths, strict=True)),
                          made_up(**{name: [draw(VALUES) for _ in range(width)]
                                     for name, width in zip(names, widths, strict=True)}))
    budgets = {"macs": draw(st.integers(1, 100)) / 100}
    if channels := draw(st.sampled_from([None, 0.5])):
        budgets["channels"] = channels
    reached = [without(channels_of(order[:count])) for count in range(len(order) + 1)]
    left = [1 - count / sum(widths) for count in range(len(order) + 1)]
    fit = [macs <= budgets["macs"] * reached[0] * (1 + 1e-12) and share <= budgets.get("channels", 1) + 1e-12
           for macs, share in zip(reached, left, strict=True)]
    if not any(fit):
        with pytest.raises(ValueError, match="cannot be reached") as error:
            select(order, costs, budgets, without)  # type: ignore[arg-type]
        if left[-1] <= budgets.get("channels", 1):
            (told,) = re.findall(r", ([\d.e-]+) of the macs remain", str(error.value))
            assert reached[-1] / reached[0] - 1e-12 <= float(told) <= 1.001 * reached[-1] / reached[0]  # rounded up
        return
    gone = select(order, costs, budgets, without)  # type: ignore[arg-type]
    assert costs.totals["macs"] == without(gone) <= budgets["macs"] * reached[0] * (1 + 1e-12)
    assert costs.totals["channels"] == sum(widths) - sum(map(len, gone.values()))
    first = fit.index(True)
    assert without(gone) >= reached[first]  # what came back came back from the fewest steps that are enough
    if first:
        last = order[first - 1]
        assert set(last.channels) <= set(gone[last.group].tolist())


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A few convolutions, some grouped or depthwise, some with shortcuts, at random."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = [nn.Conv2d(2, width := draw(st.sampled_from([4, 6, 8])), 3, padding=1)]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["plain", "residual", "depthwise", "grouped", "norm"]))
        if kind == "residual":
            layers.append(Shortcut(width, draw(st.integers(1, 5))))
        elif kind == "depthwise":
            layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(width))
        else:
            new = draw(st.sampled_from([2, 4, 10]))
            layers.append(nn.Conv2d(width, new, 1, groups=2 if kind == "grouped" else 1))
            width = new
        layers.append(nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3))
    return nn.Sequential(*layers, *head).eval(), torch.randn(2, 2, 5, 5)


class Shortcut(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@settings(QUICK, max_examples=15)
@given(networks(), st.integers(5, 100), st.sampled_from(["channels", "params", "macs"]))
def test_random_networks(network: tuple[nn.Module, Tensor], percent: int, unit: str) -> None:
    """Surgery is the mask, the report is the truth, and the budget holds."""
    model, x = network
    scores = fastscore.score(model, [x], progress=False)
    try:
        result = fastscore.prune(model, scores, x, **{unit: percent / 100})  # type: ignore[arg-type]
    except ValueError as error:
        assert "cannot be reached" in str(error)  # noqa: PT017
        return
    before, after = getattr(result.report, unit)
    assert after <= percent / 100 * before * (1 + 1e-9)
    assert result.report.params == tuple(sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    kept = 1 - sum(map(len, result.removed.values())) / result.report.channels[0]
    same = fastscore.prune(model, scores, x, channels=min(1, kept * (1 + 1e-12)))
    with torch.no_grad(), fastscore.mask(model, scores, 1 - min(1, kept * (1 + 1e-12)), x):
        torch.testing.assert_close(same.model(x), model(x), rtol=1e-4, atol=1e-5)
