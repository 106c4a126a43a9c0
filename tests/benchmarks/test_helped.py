"""Torch-Pruning's Taylor importance, with labels and without, against its formula."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Group
from oracles import untouched
from torch import Tensor, nn

from benchmarks.paper.helped import torch_pruning_taylor
from benchmarks.paper.networks import NETWORKS as PAPERS
from fastscore.fingerprints import sample_ids
from fastscore.graph.tracing import trace
from fastscore.scoring.gradients import random_gradient

LABELS = torch.tensor([3, 1, 0, 2, 1])


def taylor(model: nn.Module, group: Group) -> Tensor:
    """Σ |w·∂w| over the weights of a channel in each layer, the mean over layers, then scaled to mean 1."""
    products = {layer: (w.detach() * w.grad).abs() for layer in (*group.producers, *group.edges)
                if (w := model.get_submodule(layer).weight) is not None}
    made = [products[layer].flatten(1).sum(1) for layer in group.producers]
    read = [torch.stack([products[layer][:, list(places)].sum() for places in positions])
            for layer, positions in group.edges.items()]
    mean = torch.stack(made + read).mean(0)
    return mean / mean.mean()


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("name", ["plain", "residual", "flattening"])
def test_the_value_of_every_channel(name: str, labels: Tensor | None) -> None:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(5)
    with untouched(model):
        found = [torch_pruning_taylor(model, x, labels, batch, seed=4) for batch in (2, 5)]
    z = model(x)
    if labels is None:
        z.backward(random_gradient(z, sample_ids(x), 4, 0, "normal", True))
    else:
        F.cross_entropy(z, labels, reduction="sum").backward()
    exact = {group: taylor(model, spec).float() for group, spec in network.groups.items()}
    for values in found:
        torch.testing.assert_close(values, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20", "vgg6"])
def test_it_runs_on_the_papers_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x = PAPERS[name](1, 10), torch.randn(4, 1, 16, 16)
    with untouched(model):
        loss, helped, other = (torch_pruning_taylor(model, x, labels, 2, seed)
                               for labels, seed in ((torch.arange(4), 0), (None, 0), (None, 1)))
    assert {layer: len(values) for layer, values in helped.items()} \
        == {group.name: group.channels for group in trace(model, x[:1]).groups}
    for layer, values in helped.items():
        assert torch.isfinite(values).all()
        assert len(values.unique()) > 1
        assert not torch.equal(values, loss[layer])
        assert not torch.equal(values, other[layer])
