"""In which order the channels of a group go where a linear repair follows: against least squares by brute force."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.pruning.order import redundancy
from fastscore.recovery.moments import InputMoments, Moments, layouts

C = 6


class Reads(nn.Module):
    """Channels that depend on each other, a layer that reads them, and what follows it."""

    def __init__(self, reader: nn.Module, after: nn.Module | None = None, pool: bool = False) -> None:
        super().__init__()
        self.made, self.reader, self.after, self.pool = nn.Conv2d(4, C, 1), reader, after or nn.Identity(), pool
        nn.init.normal_(self.made.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.made(x).relu()
        x = x.flatten(1) if isinstance(self.reader, nn.Linear) else x
        x = self.after(self.reader(x))
        return x.flatten(1) if self.pool else x.flatten(2).mean(2) if x.dim() > 2 else x


def norm() -> nn.Module:
    layer = nn.BatchNorm2d(5)
    nn.init.uniform_(layer.weight, 0.2, 3.0)
    nn.init.uniform_(layer.running_var, 0.2, 3.0)
    return layer


CASES: dict[str, Callable[[], Reads]] = {
    "1x1": lambda: Reads(nn.Conv2d(C, 5, 1)),
    "strided": lambda: Reads(nn.Conv2d(C, 5, 1, stride=2)),
    "normalised": lambda: Reads(nn.Conv2d(C, 5, 1, bias=False), norm()),
    "many outputs": lambda: Reads(nn.Conv2d(C, 40, 1)),
    "transposed": lambda: Reads(nn.ConvTranspose2d(C, 5, 1)),
    "flattened": lambda: Reads(nn.Linear(C * 9, 5)),
}


def case(name: str) -> tuple[nn.Module, ChannelGroup, dict[str, Moments], dict[str, str], Tensor]:
    torch.manual_seed(len(name))
    model = CASES[name]().double().eval()
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64)
    graph, eval_model = trace(model, x[:2]), evaluation_copy(model)
    (group,) = graph.groups
    with torch.no_grad(), InputMoments(eval_model, layouts(eval_model, graph.groups, ["reader"])) as inputs:
        eval_model(x)
    return eval_model, group, inputs.moments, dict(graph.normalized_by), x


def lost(model: nn.Module, moments: Moments, gone: list[int]) -> float:
    """The share of the variance of what the reader makes that is lost with channels, those that stay standing in for
    them as well as they can: a ridge regression on rows."""
    reader = model.reader
    rest = [channel for channel in range(C) if channel not in gone]
    covariance = moments.covariance[0]
    covariance = covariance + torch.diag(redundancy.RIDGE * covariance.diagonal()
                                         + redundancy.NOISE * covariance.diagonal().max())
    weight = reader.weight.detach()
    weight = weight.transpose(0, 1) if isinstance(reader, nn.ConvTranspose2d) else weight
    weight = weight.unflatten(1, (C, -1)) if weight.dim() == 2 else weight.flatten(2)
    weight = weight.transpose(1, 2)  # [outputs, places, C]
    if isinstance(model.after, nn.BatchNorm2d):
        after = model.after
        weight = weight * (after.weight / (after.running_var + after.eps).sqrt()).detach()[:, None, None]
    weight = weight.flatten(0, 1)
    factor = torch.linalg.cholesky(covariance)  # rows whose second moments those are
    made = factor.T @ weight.T
    fit = factor.T[:, rest] @ torch.linalg.lstsq(factor.T[:, rest], made).solution if rest else 0 * made
    return float((made - fit).square().sum() / ((weight @ moments.covariance[0]) * weight).sum())


@pytest.mark.parametrize("name", list(CASES))
def test_what_channels_cost_one_after_another_is_what_is_lost_with_all_of_them(name: str) -> None:
    model, group, moments, normalized_by, _ = case(name)
    (reader,) = redundancy._readers(model, group, torch.arange(C), moments, normalized_by)
    gone: list[int] = []
    total = 0.0
    for channel in (4, 1, 5, 0):
        costs = reader.costs(C)
        for other in set(range(C)) - set(gone):
            expected = lost(model, moments["reader"], [*gone, other]) - total
            assert float(costs[other]) == pytest.approx(expected, rel=1e-6, abs=1e-10)
        total += float(costs[channel])
        gone.append(channel)
        reader.remove(channel)


def test_the_values_are_the_geometric_mean_in_the_order_of_what_is_left() -> None:
    model, group, moments, normalized_by, _ = case("1x1")
    importances = torch.rand(C, dtype=torch.float64)
    found = redundancy.values(model, group, importances, moments, normalized_by)
    assert float(found.sum()) == pytest.approx(float(importances.sum()))
    gone: list[int] = []
    expected: list[float] = []
    for _ in range(int(redundancy.MOST * C)):
        before = lost(model, moments["reader"], gone)
        costs = {other: math.sqrt(float(importances[other]) * (lost(model, moments["reader"], [*gone, other]) - before))
                 for other in range(C) if other not in gone}
        gone.append(min(costs, key=lambda channel: costs[channel]))
        expected.append(max([*expected, costs[gone[-1]]]))
    order = found.argsort(stable=True).tolist()
    assert [found[channel] for channel in order] == sorted(found.tolist())
    assert sorted(order[:len(gone)]) == sorted(gone)
    ratio = [float(found[channel]) / value for channel, value in zip(gone, expected, strict=True)]
    assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=1e-5)


def test_of_two_that_are_alike_one_goes_and_one_stays() -> None:
    torch.manual_seed(0)
    model = Reads(nn.Conv2d(C, 5, 1)).double().eval()
    with torch.no_grad():
        model.made.weight[1], model.made.bias[1] = model.made.weight[0], model.made.bias[0]  # type: ignore[index]
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64)
    graph, eval_model = trace(model, x[:2]), evaluation_copy(model)
    with torch.no_grad(), InputMoments(eval_model, layouts(eval_model, graph.groups, ["reader"])) as inputs:
        eval_model(x)
    found = redundancy.values(eval_model, graph.groups[0], torch.ones(C), inputs.moments, {})
    first, second = sorted(found[:2].tolist())
    assert first == found.min()
    assert second > 2 * first  # with a ridge, which is why it is not more


class Grouped(nn.Module):
    """A grouped convolution: the channels at the same place of its groups go together. Another layer reads half."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Conv2d(4, 8, 1)
        self.reader, self.again = nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.made(x).relu()
        y: Tensor = (self.reader(x) + self.again(x)).mean((2, 3))
        return y


def test_each_block_counts_for_what_it_reads() -> None:
    torch.manual_seed(0)
    model = Grouped().double().eval()
    x = torch.randn(64, 4, 5, 5, dtype=torch.float64)
    (group,), eval_model = trace(model, x[:2]).groups, evaluation_copy(model)
    assert group.unit.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    with torch.no_grad(), InputMoments(eval_model, layouts(eval_model, [group], ["reader", "again"])) as inputs:
        eval_model(x)
    moments = {"reader": inputs.moments["reader"]}
    first, second = redundancy._readers(eval_model, group, group.unit, moments, {})
    assert first.unit.tolist() == second.unit.tolist() == [0, 1, 2, 3]
    weights = model.reader.weight.detach().unflatten(0, (2, 3)).movedim(2, -1).flatten(1, -2)
    whole = float(((weights @ moments["reader"].covariance) * weights).sum())
    for reader, weight in zip((first, second), weights, strict=True):
        torch.testing.assert_close(reader.weight.square().sum(0), weight.square().sum(0) / whole)
    values = redundancy.values(eval_model, group, torch.rand(8), moments, {})
    assert values[:4].tolist() == values[4:].tolist()
    both = dict(inputs.moments)  # the other layer reads two channels that go together, of which the costs do not add up
    importances = torch.rand(8)
    assert torch.equal(redundancy.values(eval_model, group, importances, both, {}), importances.double())


def test_what_goes_together_or_is_read_by_nothing_known_keeps_its_importance() -> None:
    model, group, moments, normalized_by, _ = case("1x1")
    importances = torch.rand(C)
    assert torch.equal(redundancy.values(model, group, importances, {}, normalized_by), importances.double())
    pairs = ChannelGroup(group.name, C, torch.arange(C) // 2, group.members)
    assert torch.equal(redundancy.values(model, pairs, importances, moments, normalized_by), importances.double())
    still = {"reader": Moments(moments["reader"].index)}
    assert torch.equal(redundancy.values(model, group, importances, still, normalized_by), importances.double())
    alone = {"reader": Moments(torch.arange(C).reshape(C, 1, 1))}  # of a layer that reads very many inputs
    alone["reader"].add(torch.randn(8, C))
    assert torch.equal(redundancy.values(model, group, importances, alone, normalized_by), importances.double())
