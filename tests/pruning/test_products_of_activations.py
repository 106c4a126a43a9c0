"""Budgets in MACs where products of activations, such as attention, are among them."""

from functools import partial

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.tracing import trace
from fastscore.pruning import building
from fastscore.pruning.budgets.costs import Costs
from fastscore.pruning.order.ranking import channel_costs
from fastscore.pruning.surgery import macs_without


class GraphConvolution(nn.Module):
    """Two layers of A·h: what neither holds nor is in any layer costs T·T for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.softmax(x @ x.mT, -1)
        return self.l3((adjacency @ self.l2((adjacency @ self.l1(x)).relu())).relu().mean(1))

    @staticmethod
    def macs(length: int, first: int, second: int) -> int:
        return length * (5 * length + 5 * first + length * first + first * second + length * second) + 3 * second


@pytest.mark.parametrize("length", [1, 7, 16, 64])
def test_products_of_activations_while_choosing(length: int) -> None:
    """No width that any one more removed channel leads to lies between what was chosen and the budget."""
    torch.manual_seed(0)
    model, x = GraphConvolution(), torch.randn(2, length, 5)
    scores = fastscore.score(model, [x], progress=False)
    dense = model.macs(length, 16, 16)
    for cost_aware in (False, True):
        for share in (0.9, 0.75, 0.6, 0.4, 0.2):
            reachable = model.macs(length, 1, 1) / dense <= share
            if not reachable:
                with pytest.raises(ValueError, match="^macs: .* cannot be reached: .* "
                                   f"{model.macs(length, 1, 1) / dense:.4g} of the macs"):
                    fastscore.prune(model, scores, x, macs=share, cost_aware=cost_aware)
                continue
            result = fastscore.prune(model, scores, x, macs=share, cost_aware=cost_aware)
            widths = result.model.l1.out_features, result.model.l2.out_features
            assert result.report.macs == (dense, model.macs(length, *widths))
            assert result.report.macs[1] / dense <= share
            more = [model.macs(length, widths[0] + a, widths[1] + b) for a, b in ((1, 0), (0, 1))
                    if widths[0] + a <= 16 and widths[1] + b <= 16]
            assert max(more) > share * dense
            assert all(macs > share * dense for macs in more)


def test_the_price_of_a_channel_holds_its_products() -> None:
    model, x = GraphConvolution(), torch.randn(2, 7, 5)
    groups = trace(model, x).groups
    costs = Costs(model.eval(), groups, x)
    costs.learn_products(partial(macs_without, model, groups, x, call_model, 0))
    assert costs.totals == costs.dense
    prices = channel_costs(costs, "macs")
    assert prices["l1"].tolist() == [7 * (5 + 7 + 16)] * 16
    assert prices["l2"].tolist() == [7 * (16 + 7) + 3] * 16


def test_nothing_is_tried_twice_where_all_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cut to learn that no product of activations follows a width, one to see that the budget holds."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], progress=False)
    cuts = []
    count = building.macs_without
    monkeypatch.setattr(building, "macs_without", lambda *args: cuts.append(args[-1]) or count(*args))
    fastscore.prune(model, scores, x, channels=0.7)
    assert not cuts
    fastscore.prune(model, scores, x, macs=0.7)
    assert 2 <= len(cuts) <= 4
