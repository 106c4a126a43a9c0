"""Budgets in MACs where products of activations, such as attention, are among them."""

from functools import partial

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.tracing import trace
from fastscore.pruning import building, surgery
from fastscore.pruning.budgets.costs import Costs, total_macs
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


def test_no_cut_is_tried_where_layers_alone_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is returned shows that the budget holds."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs()
    scores = fastscore.score(model, [x], progress=False)
    monkeypatch.setattr(building, "macs_without", lambda *args: pytest.fail("a cut is tried"))
    runs, count = [], surgery.count
    monkeypatch.setattr(surgery, "count", lambda *args: runs.append(args) or count(*args))
    result = fastscore.prune(model, scores, x, macs=0.7)
    assert len(runs) == 1
    assert result.report.macs == (total_macs(model, x), total_macs(result.model, x))
    assert 0.6 < result.report.macs[1] / result.report.macs[0] <= 0.7


def test_sums_that_are_wrong_are_found_out_by_the_smaller_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was learned of products of activations, the budget holds for what is counted."""
    model, x = GraphConvolution(), torch.randn(2, 7, 5)
    scores, dense = fastscore.score(model, [x], progress=False), model.macs(7, 16, 16)
    monkeypatch.setattr(Costs, "learn_products", lambda self, macs_without: setattr(self, "sums_hold", True))
    for share in (0.9, 0.6, 0.4):
        result = fastscore.prune(model, scores, x, macs=share)
        widths = result.model.l1.out_features, result.model.l2.out_features
        assert result.report.macs == (dense, model.macs(7, *widths))
        assert result.report.macs[1] / dense <= share
        assert max(model.macs(7, widths[0] + a, widths[1] + 1 - a) for a in (0, 1)) > share * dense
    least = model.macs(7, 1, 1) / dense
    with pytest.raises(ValueError, match=f"cannot be reached: .* {least:.4g} of the macs"):
        fastscore.prune(model, scores, x, macs=least * 0.99)
