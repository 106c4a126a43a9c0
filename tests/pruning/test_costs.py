"""MACs and parameters: by hand, by PyTorch's counter, and as channels come and go."""

import pytest
import torch
from networks import NETWORKS, Network
from oracles import params
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import Costs, total_macs


def counted(model: nn.Module, network: Network, samples: int = 1) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(network.inputs(samples))
    return counter.get_total_flops() // 2 // samples


def test_by_hand() -> None:
    """conv 3→5 (3x3) on 8x8, pool, conv 5→7 (3x3) on 4x4, Linear 7→4; then the same with 3 and 6 channels."""
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(6)
    graph = trace(model, x)
    costs = Costs(model, graph.groups, x)
    assert costs.totals == {"channels": 12, "macs": 3 * 5 * 9 * 64 + 5 * 7 * 9 * 16 + 7 * 4,
                            "params": 3 * 5 * 9 + 5 + 5 * 7 * 9 + 7 + 2 * 7 + 7 * 4 + 4}
    costs.remove("0", [0, 4])
    costs.remove("3", [2])
    assert costs.totals == {"channels": 9, "macs": 3 * 3 * 9 * 64 + 3 * 6 * 9 * 16 + 6 * 4,
                            "params": 3 * 3 * 9 + 3 + 3 * 6 * 9 + 6 + 2 * 6 + 6 * 4 + 4}
    costs.restore("3", [2])
    costs.restore("0", [4, 0])
    assert costs.totals == costs.dense


@pytest.mark.parametrize("name", list(NETWORKS))
def test_predicted_costs_are_those_of_the_pruned_model(name: str) -> None:
    network = NETWORKS[name]
    for seed in range(3):
        model, x = network.traced(), network.inputs(2)
        graph = trace(model, x)
        costs = Costs(model, graph.groups, x)
        assert costs.totals["macs"] == counted(model, network) == total_macs(model, x) == total_macs(model, x[:1])
        assert costs.totals["params"] == params(model)
        generator = torch.Generator().manual_seed(seed)
        removed = {}
        for group in graph.groups:
            units = int(group.unit.max()) + 1
            gone = torch.rand(units, generator=generator) < 0.4
            gone[int(torch.randint(units, (1,), generator=generator))] = False
            removed[group.name] = gone[group.unit].nonzero().flatten()
            costs.remove(group.name, removed[group.name].tolist())
        pruned = remove_channels(model, graph.groups, removed)
        assert costs.totals["macs"] == pytest.approx(counted(pruned, network), rel=1e-12)
        assert costs.totals["params"] == pytest.approx(params(pruned), rel=1e-12)
        assert costs.totals["channels"] == sum(g.channels for g in graph.groups) - sum(map(len, removed.values()))
