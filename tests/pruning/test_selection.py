"""Budgets, on channels and costs made up for the purpose, and on small networks."""

import math
from dataclasses import replace

import pytest
import torch
from made_up_costs import Prices, group, made_up, removed
from networks import NETWORKS
from oracles import untouched
from torch import nn

import fastscore
from fastscore.graph.groups import Member
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import channel_multiple
from fastscore.pruning.budgets.finer_steps import say_coarse
from fastscore.pruning.budgets.selection import RECOUNTS, select
from fastscore.pruning.order.ranking import RemovalStep, layer_kinds, removal_order


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
    model, x = NETWORKS["mobile"].traced(), NETWORKS["mobile"].inputs()
    groups = trace(model, x).groups
    assert layer_kinds(model, groups) == {
        "stem.0": "Conv2d (3, 3)", "expand.0": "Conv2d (1, 1)", "depthwise.0": "Conv2d (3, 3) depthwise",
        "project.0": "Conv2d (1, 1)", "last.0": "Conv2d (1, 1)", "head.fc": "Linear",
        **dict.fromkeys(("stem.1", "expand.1", "depthwise.1", "project.1", "last.1"), "BatchNorm2d")}


def test_isomorphic_blocks_of_a_network_are_one_class() -> None:
    """Both blocks' inner channels are made and read by 3x3 convolutions: the block whose scores are lowest shrinks."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    low = replace(scores, totals={**scores.totals, "block2.conv1": scores.totals["block2.conv1"] * 1e-6})
    widths = {row.layer: row.channels for row in
              fastscore.prune(model, low, x, channels=0.6, scope="isomorphic").report.groups}
    assert widths["block1.conv1"] == (5, 5)
    assert widths["block2.conv1"][1] <= 3
    assert widths["block2.conv2"][1] < 7  # another class (it is read by a Linear), which shrinks as well
    with fastscore.mask(model, low, 0.4, x, scope="isomorphic") as masked:
        assert "block1.conv1" not in masked


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
    model, x = NETWORKS["plain"].traced(), NETWORKS["plain"].inputs()
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


def test_a_budget_that_everything_already_meets_removes_nothing() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=1.0, params=1.0, macs=1.0)
    assert not result.removed
    assert torch.equal(result.model(x), model(x))


def test_scores_of_what_a_model_holds() -> None:
    """The error says where that is."""
    inner, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
    scores = fastscore.score(inner, [x], progress=False)
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    with pytest.raises(ValueError, match=r"another model, .* layer 0; .*: give its \.module, or score"):
        fastscore.prune(averaged, scores, x, channels=0.5)
    assert fastscore.prune(averaged.module, scores, x, channels=0.5).model[0].out_features == 4


@pytest.mark.parametrize("price", [0, 2])
def test_trial_cuts_are_few_whatever_is_foreseen(price: float) -> None:
    """Each group costs one, and is foreseen to cost nothing, or twice as much: by either, no count is right."""
    count, calls = 600, 0
    names = [f"g{number}" for number in range(count)]
    steps = [RemovalStep(name, (0,), number) for number, name in enumerate(names)]
    costs = Prices(**dict.fromkeys(names, (1, price)))
    costs.totals["macs"] = costs.dense["macs"] = count

    def without(gone: dict[str, torch.Tensor]) -> int:
        nonlocal calls
        calls += 1
        return count - len(gone)

    gone = select(steps, costs, {"macs": 0.5}, without)  # type: ignore[arg-type]
    assert costs.totals["macs"] == count - len(gone) == count / 2
    assert calls <= 2 * RECOUNTS + 40
