"""Budgets, on channels and costs made up for the purpose, and on small random networks."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.cutting.surgery import remove_indices, removed_indices
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs, channel_multiple, total_macs
from fastscore.pruning.budgets.finer_steps import say_coarse, with_finer_steps
from fastscore.pruning.budgets.selection import channels_of, select
from fastscore.pruning.order.ranking import RemovalStep, channel_costs, layer_kinds, removal_order
from fastscore.scoring.scores import Origin, Scores

ORIGIN = Origin("taylor-sq", "sum", "random", True, 0, "normal", "made up")
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Prices:
    """The costs of independent groups: each channel of a group costs the same."""

    sums_hold = False

    def __init__(self, **groups: tuple[int, float]) -> None:
        self.price = {name: price for name, (_, price) in groups.items()}
        self.totals = {"channels": sum(n for n, _ in groups.values()), "params": sum(n * p for n, p in groups.values()),
                       "macs": sum(n * p for n, p in groups.values())}
        self.dense = dict(self.totals)

    def remove(self, group: str, channels: Sequence[int], sign: int = -1) -> None:
        self.totals["channels"] += sign * len(channels)
        for unit in ("params", "macs"):
            self.totals[unit] += sign * self.price[group] * len(channels)

    def restore(self, group: str, channels: Sequence[int]) -> None:
        self.remove(group, channels, 1)


def group(name: str, channels: int, unit: Sequence[int] | None = None) -> ChannelGroup:
    return ChannelGroup(name, channels, torch.tensor(unit or range(channels)), ())


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def made_up(**values: Sequence[float]) -> Scores:
    return Scores({name: torch.tensor(row, dtype=torch.float64) for name, row in values.items()}, ORIGIN)


def removed(steps: list[RemovalStep], costs: Prices, **budgets: float) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in select(steps, costs, budgets).items()}  # type: ignore[arg-type]


def test_the_least_important_go_first() -> None:
    groups = (group("a", 4), group("b", 3))
    steps = removal_order(groups, made_up(a=[5, 1, 7, 2], b=[3, 9, 1.5]))
    assert [(step.group, step.channels) for step in steps] == \
        [("a", (1,)), ("b", (2,)), ("a", (3,)), ("b", (0,)), ("a", (0,))]  # one of each stays
    assert removed(steps, Prices(a=(4, 1), b=(3, 1)), channels=4 / 7) == {"a": [1, 3], "b": [2]}


def test_ties_go_in_order_and_no_further_than_asked() -> None:
    """80 % of the scores are zero and 30 % are to go: 30 % go, and no group goes whole."""
    groups = (group("a", 10), group("b", 10))
    scores = made_up(a=[0] * 10, b=[0, 0, 0, 0, 0, 0, 4, 3, 2, 1])
    for share in range(1, 19):
        gone = removed(removal_order(groups, scores), Prices(a=(10, 1), b=(10, 1)), channels=1 - share / 20)
        assert sum(map(len, gone.values())) == share
        assert gone["a"] == list(range(min(share, 9)))


def test_layers_shrink_alike_within_the_layer() -> None:
    groups = (group("a", 10), group("b", 20))
    scores = made_up(a=[100 + i for i in range(10)], b=list(range(20)))
    gone = removed(removal_order(groups, scores, "layer"), Prices(a=(10, 1), b=(20, 1)), channels=0.5)
    assert gone == {"a": list(range(5)), "b": list(range(10))}
    gone = removed(removal_order(groups, scores, "global"), Prices(a=(10, 1), b=(20, 1)), channels=0.5)
    assert gone == {"b": list(range(15))}


def test_costs_weigh_by_hand() -> None:
    """a's channels cost 1 and 4, b's cost 2: per unit of cost they are worth 5, 1/4, 7, 2/4 and 3/2, 9/2, 1.5/2."""
    prices = {"a": torch.tensor([1, 4, 1, 4.]), "b": torch.tensor([2, 2, 2.])}
    steps = removal_order((group("a", 4), group("b", 3)), made_up(a=[5, 1, 7, 2], b=[3, 9, 1.5]), channel_costs=prices)
    assert [(step.group, step.channels, step.value) for step in steps] == \
        [("a", (1,), 0.25), ("a", (3,), 0.5), ("b", (2,), 0.75), ("b", (0,), 1.5), ("a", (0,), 5.0)]


def test_a_channel_that_costs_nothing_goes_last() -> None:
    prices = {"a": torch.tensor([1, 0, 1.]), "b": torch.tensor([2, 2, 2.])}
    steps = removal_order((group("a", 3), group("b", 3)), made_up(a=[5, 0, 7], b=[3, 9, 1.5]), channel_costs=prices)
    assert [step.channels for step in steps if step.group == "a"] == [(0,), (2,)]


def test_classes_shrink_alike_and_compare_within() -> None:
    """a and b are of one class, and the lowest of its channels are all b's; c is another, which loses as much."""
    members = {"a": "conv", "b": "conv", "c": "linear"}
    nothing = torch.empty(0, dtype=torch.int64)
    groups = tuple(replace(group(name, 5 if name == "b" else 3), members=(Member(name, "producer", nothing, nothing),))
                   for name in members)
    scores = made_up(a=[6, 7, 8], b=[1, 2, 3, 4, 5], c=[100, 300, 200])
    costs = Prices(a=(3, 1), b=(5, 1), c=(3, 1))
    steps = removal_order(groups, scores, "isomorphic", kinds=members)
    assert [(step.group, step.channels[0]) for step in steps] == \
        [("b", 0), ("c", 0), ("b", 1), ("b", 2), ("c", 2), ("b", 3), ("a", 0), ("a", 1)]
    assert removed(steps, costs, channels=6 / 11) == {"b": [0, 1, 2], "c": [0, 2]}


def test_the_kinds_of_real_layers() -> None:
    model, x = NETWORKS["mobile"].model(), NETWORKS["mobile"].inputs()
    groups = trace(model, x).groups
    assert layer_kinds(model, groups) == {
        "stem.0": "Conv2d (3, 3)", "expand.0": "Conv2d (1, 1)", "depthwise.0": "Conv2d (3, 3) depthwise",
        "project.0": "Conv2d (1, 1)", "last.0": "Conv2d (1, 1)", "head.fc": "Linear",
        **dict.fromkeys(("stem.1", "expand.1", "depthwise.1", "project.1", "last.1"), "BatchNorm2d")}


def test_isomorphic_blocks_of_a_network_are_one_class() -> None:
    """Both blocks' inner channels are made and read by 3x3 convolutions: the block whose scores are lowest shrinks."""
    model, x = NETWORKS["residual"].model(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    low = replace(scores, totals={**scores.totals, "block2.conv1": scores.totals["block2.conv1"] * 1e-6})
    widths = {row.layer: row.channels for row in
              fastscore.prune(model, low, x, channels=0.6, scope="isomorphic").report.groups}
    assert widths["block1.conv1"] == (5, 5)
    assert widths["block2.conv1"][1] <= 3
    assert widths["block2.conv2"][1] < 7  # another class (it is read by a Linear), which shrinks as well
    with fastscore.mask(model, low, 0.4, x, scope="isomorphic") as masked:
        assert "block1.conv1" not in masked


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "grouped", "unet", "chunked", "flattening"])
@pytest.mark.parametrize("compensate", [False, True])
def test_the_price_of_a_channel_is_what_its_surgery_saves(name: str, compensate: bool) -> None:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(2)
    groups = trace(model, x).groups
    costs = Costs(model, groups, x, compensate=compensate)
    for unit, count in (("macs", lambda m: total_macs(m, x)), ("params", params)):
        prices = channel_costs(costs, unit)  # type: ignore[arg-type]
        assert costs.totals == costs.dense
        for each in groups:
            first = each.unit == each.unit[0]
            small = remove_indices(copy.deepcopy(model), removed_indices(groups, {each.name: first.nonzero()[:, 0]}))
            assert float(prices[each.name][first].sum()) == pytest.approx(count(model) - count(small), rel=1e-9)
    assert any(layer.bias_below for layer in costs.layers.values()) == \
        (compensate and name not in ("flattening", "unet"))


def test_cost_aware_pruning_keeps_more_channels_within_the_same_budget() -> None:
    """All channels are as important but for a trace, by which those that cost least go first without costs."""
    model, x = NETWORKS["residual"].model(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    for unit in ("macs", "params"):
        prices = channel_costs(Costs(model, trace(model, x).groups, x), unit)  # type: ignore[arg-type]
        equal = replace(scores, totals={layer: 1 + 1e-9 * price for layer, price in prices.items()})
        plain, aware = (fastscore.prune(model, equal, x, cost_aware=aware, **{unit: 0.5}).report  # type: ignore[arg-type]
                        for aware in (False, True))
        assert aware.channels[1] > plain.channels[1]
        assert getattr(aware, unit)[1] / getattr(aware, unit)[0] <= 0.5


@pytest.mark.parametrize(("capability", "dtype", "multiple"), [
    ("AVX512", torch.float32, 16), ("AVX512", torch.bfloat16, 32), ("AVX512", torch.float64, 8),
    ("AVX2", torch.float32, 8), ("AVX2", torch.bfloat16, 16), ("DEFAULT", torch.float32, 8)])
def test_widths_that_the_hardware_likes(capability: str, dtype: torch.dtype, multiple: int,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = nn.Sequential(nn.Linear(4, 70), nn.ReLU(), nn.Linear(70, 3)).to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    assert channel_multiple(model) == multiple
    assert channel_multiple(nn.Linear(2, 2, device="meta", dtype=torch.float16)) == 16
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    assert fastscore.prune(model, scores, x, channels=0.75, round_to="auto").report.channels[1] == \
        int(0.75 * 70) // multiple * multiple


@pytest.mark.parametrize(("bad", "message"), [
    ({"round_to": 0}, "round_to: 0"), ({"round_to": "8"}, "round_to: '8'"), ({"floor": 1.5}, "floor: 1.5"),
    ({"scope": "group"}, "scope: 'group' is none of global, layer, isomorphic"),
    ({"scope": "layer", "cost_aware": True}, "cost_aware: ")])
def test_rankings_that_make_no_sense(bad: dict[str, object], message: str) -> None:
    model, x = NETWORKS["plain"].model(), NETWORKS["plain"].inputs()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    with untouched(model), pytest.raises(ValueError, match=f"^{message}"):
        fastscore.prune(model, scores, x, channels=0.5, **bad)  # type: ignore[arg-type]
    if set(bad) == {"scope"}:
        with untouched(model), pytest.raises(ValueError, match=f"^{message}"), \
                fastscore.mask(model, scores, 0.5, x, **bad):  # type: ignore[arg-type]
            pass


def test_units_go_whole() -> None:
    steps = removal_order((group("a", 6, [0, 1, 2, 0, 1, 2]),), made_up(a=[1, 9, 2, 1, 9, 4]))
    assert [step.channels for step in steps] == [(0, 3), (2, 5)]


@pytest.mark.parametrize("round_to", [1, 2, 3, 4, 8])
def test_widths_that_remain_are_multiples(round_to: int) -> None:
    groups = (group("a", 24), group("b", 17), group("c", 5))
    scores = made_up(a=list(range(24)), b=list(range(17)), c=list(range(5)))
    steps = removal_order(groups, scores, round_to=round_to)
    for count in range(len(steps) + 1):
        for each, width in zip("abc", (24, 17, 5), strict=True):
            kept = width - sum(len(step.channels) for step in steps[:count] if step.group == each)
            assert kept == width or kept % round_to == 0
            assert kept > 0


def test_a_floor_for_every_group() -> None:
    for floor in (0, 0.1, 0.07, 0.3, 0.57, 0.999, 1):
        steps = removal_order((group("a", 100),), made_up(a=list(range(100))), floor=floor)
        assert 100 - sum(len(step.channels) for step in steps) == max(1, math.ceil(round(floor * 100, 9)))


def test_the_most_important_come_back_when_a_big_step_made_room() -> None:
    steps = [RemovalStep("small", (i,), i) for i in range(5)] + [RemovalStep("big", (0,), 5.0)]
    costs = Prices(small=(10, 1), big=(2, 10))  # 30 in all; at most 20 remains
    assert removed(steps, costs, params=20 / 30) == {"big": [0]}
    assert costs.totals["params"] == 20


def test_a_branch_that_would_go_far_below_stays_and_the_report_says_so() -> None:
    """Two branches of 40 and ten channels of 2 are 100; 50 may remain, and do without one branch and five channels."""
    steps = [RemovalStep("one", (0,), 0.0, whole=True), RemovalStep("two", (0,), 1.0, whole=True)]
    steps += [RemovalStep("fine", (channel,), 2.0) for channel in range(9)]
    costs, budgets = Prices(one=(1, 40), two=(1, 40), fine=(10, 2)), {"params": 0.5}
    assert removed(steps, costs, **budgets) == {"one": [0], "fine": list(range(5))}
    gone = {"one": torch.tensor([0]), "fine": torch.arange(5)}
    said = say_coarse(steps, gone, costs, budgets)  # type: ignore[arg-type]
    assert said.endswith("without them: two (10.0% of the params where 50.0% may remain)")
    costs = Prices(one=(1, 40), two=(1, 40), fine=(2, 2))
    assert removed(steps[:2], costs, **budgets) == {"one": [0], "two": [0]}
    said = say_coarse(steps[:2], {"one": gone["one"], "two": gone["one"]}, costs, budgets)  # type: ignore[arg-type]
    assert said.startswith("4.8% of the params where 50.0% may remain: each branch or expert that went")
    assert costs.totals["params"] == 4


def test_every_budget_holds() -> None:
    groups = (group("a", 10), group("b", 10))
    scores = made_up(a=list(range(10)), b=list(range(10, 20)))
    costs = Prices(a=(10, 1), b=(10, 5))
    removed(removal_order(groups, scores), costs, channels=0.9, params=0.5)
    assert costs.totals["params"] <= 30
    assert costs.totals["channels"] <= 18


def test_out_of_reach() -> None:
    steps = removal_order((group("a", 10),), made_up(a=list(range(10))), floor=0.5)
    with pytest.raises(ValueError, match=r"^channels: 0.4 cannot be reached: .* 0.5 of the channels remain"):
        removed(steps, Prices(a=(10, 1)), channels=0.4)


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


def test_a_budget_that_everything_already_meets_removes_nothing() -> None:
    network = NETWORKS["residual"]
    model, x = network.model(), network.inputs()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=1.0, params=1.0, macs=1.0)
    assert not result.removed
    assert torch.equal(result.model(x), model(x))
