"""random_backward against autograd, fastscore.score, and a criterion of somebody else's that reads `.grad`."""

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore.fingerprints import sample_ids
from fastscore.scoring.gradients import DISTRIBUTIONS, random_gradient


def network(name: str = "residual", samples: int = 4) -> tuple[nn.Module, Tensor]:
    """(model, x), float64."""
    return NETWORKS[name].traced(), NETWORKS[name].inputs(samples)


def filled(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every `.grad` there is."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def expected(model: nn.Module, x: Tensor, ids: Tensor | None = None, **how: Any) -> dict[str, Tensor]:
    """∂/∂w Σ v·z for the same v."""
    z = model(x)
    how = {"seed": 0, "probe": 0, "distribution": "normal", "normalize": True, "center": False, **how}
    v = random_gradient(z.detach(), sample_ids(x) if ids is None else ids, **how)
    return dict(zip((name for name, _ in model.named_parameters()),
                    torch.autograd.grad((v * z).sum(), list(model.parameters())), strict=True))


@pytest.mark.parametrize(("name", "how"), [
    *((name, {}) for name in ("plain", "residual", "unet", "tokens")),
    *(("plain", {"distribution": kind, "probe": 2, "seed": -5}) for kind in DISTRIBUTIONS),
    ("plain", {"normalize": False}), ("plain", {"center": True})])
def test_grad_is_that_of_the_output_along_the_random_direction(name: str, how: dict[str, Any]) -> None:
    model, x = network(name)
    fastscore.random_backward(model(x), x, **how)
    same(filled(model), expected(model, x, **how))


def test_it_accumulates_as_backward_does() -> None:
    model, x = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    fastscore.random_backward(model(x), x)
    same(filled(model), {name: 1 + grad for name, grad in expected(model, x).items()})


def test_frozen_parameters_get_no_grad() -> None:
    model, x = network("plain")
    model[3].requires_grad_(False)
    fastscore.random_backward(model(x), x)
    assert filled(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sizes", [(1, 6), (2, 3, 2), (1,) * 7])
def test_the_sum_over_any_batches_is_that_over_all(sizes: tuple[int, ...]) -> None:
    model, x = network(samples=7)
    parts = copy.deepcopy(model)
    fastscore.random_backward(model(x), x)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    for batch in x[order].split(sizes):
        fastscore.random_backward(parts(batch), batch)
    same(filled(parts), filled(model))


def test_it_sends_what_score_sends() -> None:
    """For one sample: s, by Euler the sum of w·∂w over the weights that read a channel, is that of fastscore.score."""
    model, x = network(samples=1)
    how: dict[str, Any] = {"seed": 8, "distribution": "rademacher", "center": True}
    fastscore.random_backward(model(x), (x, "labels that nobody reads"), **how)
    scores = fastscore.score(model, [x], progress=False, **how)
    for name, group in NETWORKS["residual"].groups.items():
        products = [(w := model.get_submodule(layer).weight) * w.grad for layer in group.edges]
        s = sum(product.transpose(0, 1).flatten(1).sum(1) for product in products)
        torch.testing.assert_close(scores[name].double(), s.detach().square(), rtol=1e-5, atol=1e-12)


def test_probes_from_one_output() -> None:
    model, x = network()
    output = model(x)
    fastscore.random_backward(output, x, distribution="orthogonal", retain_graph=True)
    fastscore.random_backward(output, x, distribution="orthogonal", probe=1)
    first, second = (expected(model, x, distribution="orthogonal", probe=probe) for probe in (0, 1))
    same(filled(model), {name: first[name] + second[name] for name in first})


def test_without_inputs_the_output_tells_samples_apart() -> None:
    model, x = network()
    fastscore.random_backward(model(x))
    same(filled(model), expected(model, x, sample_ids(model(x).detach())))
    other = copy.deepcopy(model)
    other.zero_grad()
    with torch.no_grad():
        other.head.fc.bias += 1  # changes the output, and no gradient for a given v
    known = copy.deepcopy(other)
    fastscore.random_backward(other(x))
    fastscore.random_backward(known(x), x)
    assert not torch.allclose(filled(other)["stem.0.weight"], filled(model)["stem.0.weight"])
    same({"stem.0.weight": filled(known)["stem.0.weight"]}, {"stem.0.weight": expected(model, x)["stem.0.weight"]})


def test_torch_prunings_taylor_ranks_channels_by_what_they_do() -> None:
    """Seven equal filters, read through weights that grow tenfold from one to the next: the least two are pruned."""
    model, x = network("plain", samples=8)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    with torch.no_grad():
        model[3].weight.fill_(0.1)
        model[3].bias.fill_(1.0)
        model[4].reset_parameters()
        model[8].weight[:] = torch.logspace(-3, 3, 7, dtype=torch.float64)[order] * model[8].weight.sign()
    kept = (order >= 2).nonzero()[:, 0]
    weight = model[8].weight.detach().clone()
    for batch in x.split(3):
        fastscore.random_backward(model(batch), batch)
    pruner = tp.pruner.BasePruner(model, x[:1], tp.importance.GroupTaylorImportance(), pruning_ratio=2 / 7,
                                  pruning_ratio_dict={model[0]: 0.0}, ignored_layers=[model[8]])
    pruner.step()
    assert torch.equal(model[8].weight, weight[:, kept])
    assert model(x).shape == (8, 4)


@pytest.mark.parametrize(("output", "inputs", "error", "message"), [
    (lambda z: [z], None, TypeError, "^output: list"),
    (lambda z: z.argmax(1), None, TypeError, r"^output: a torch.int64 tensor"),
    (lambda z: z.sum(), None, ValueError, "^output: it has no dimension, as a loss"),
    (lambda z: z.detach(), None, RuntimeError, "^output: it does not require grad"),
    (lambda z: z, torch.zeros(3, 2), ValueError, r"^inputs: .*\[3, 2\] where the output has 4 rows"),
    (lambda z: z, torch.tensor(1.0), ValueError, r"^inputs: .*\[\] where"),
    (lambda z: z, ["a", "b"], TypeError, "without a tensor")])
def test_what_it_refuses(output: Any, inputs: Any, error: type[Exception], message: str) -> None:
    model, x = network()
    with pytest.raises(error, match=message):
        fastscore.random_backward(output(model(x)), inputs)
    for how in ({"distribution": "uniform"}, {"distribution": "basis", "probe": 4}):
        with pytest.raises(ValueError, match=r"^(distribution|probe): "):
            fastscore.random_backward(model(x), x, **how)
    assert not filled(model)
