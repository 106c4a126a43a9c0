"""Drop-in scores in loops that differentiate gradients (create_graph=True), against brute force in float64."""

import warnings
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from networks import Group, straight
from torch import Tensor, nn
from torch.func import functional_call

from fastscore import Scorer
from fastscore.scoring.scores import Scores

GROUPS = {"0": Group(8, {"2": straight(8)}, ("0",)), "2": Group(6, {"4": straight(6)}, ("2",))}
pytestmark = pytest.mark.filterwarnings("ignore:Using backward")
Step = Callable[[nn.Module, Tensor], None]


def smooth() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, torch.randn(4, 5, dtype=torch.float64)


def input_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, the gradient of its sum, recorded)."""
    x = x.clone().requires_grad_()
    output = net(x)
    return output, torch.autograd.grad(output.sum(), x, create_graph=True)[0]


def weights_penalty(net: nn.Module) -> Tensor:
    return sum((p.grad.square().sum() for p in net.parameters() if p.grad is not None), torch.zeros(()))


def penalty_afterwards(net: nn.Module, x: Tensor) -> None:
    output, g = input_gradient(net, x)
    output.square().sum().backward(retain_graph=True)
    g.square().sum().backward()


def penalty_first(net: nn.Module, x: Tensor) -> None:
    output, g = input_gradient(net, x)
    g.square().sum().backward(retain_graph=True)
    output.square().sum().backward()


def of_weights(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum().backward(create_graph=True)
    weights_penalty(net).backward()


def of_weights_behind_an_ordinary_pass(net: nn.Module, x: Tensor) -> None:
    output = net(x)
    output.square().sum().backward(retain_graph=True)
    net.zero_grad()
    gradients = torch.autograd.grad(output.sum(), list(net.parameters()), create_graph=True)
    sum((g.square().sum() for g in gradients), torch.zeros(())).backward()


def wasserstein(net: nn.Module, x: Tensor) -> None:
    """The penalty at points of its own, in the same backward pass."""
    _, g = input_gradient(net, x + 0.5)
    (net(x).square().sum() + (g.norm(dim=1) - 1).square().sum()).backward()


def between(net: nn.Module, x: Tensor) -> None:
    """As `wasserstein`, where the penalty's forward pass is the latest one."""
    output = net(x)
    _, g = input_gradient(net, x + 0.5)
    (output.square().sum() + (g.norm(dim=1) - 1).square().sum()).backward()


def scored(step: Step, **options: Any) -> Scores:
    net, x = smooth()
    scorer = Scorer(net, x, **options)
    with scorer:
        step(net, x)
    return scorer.scores()


def plain(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum().backward()


@pytest.mark.parametrize("step", [penalty_afterwards, penalty_first, of_weights, of_weights_behind_an_ordinary_pass,
                                  wasserstein, between])
def test_scores_are_those_of_the_first_order_pass(step: Step) -> None:
    net, x = smooth()
    v = 2 * net(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using backward")
        scores = scored(step)
    assert scores.samples == 4
    for name, group in GROUPS.items():
        exact = (oracles.sums(net, group, x, v) / v.norm(dim=1, keepdim=True)).square().mean(0)
        torch.testing.assert_close(scores[name].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [penalty_afterwards, penalty_first, of_weights])
def test_gradients_of_weights_are_those_of_the_first_order_pass(step: Step) -> None:
    options: dict[str, Any] = {"importance": "molchanov-group", "normalize": False}
    exact, scores = scored(plain, **options), scored(step, **options)
    for layer in exact:
        torch.testing.assert_close(scores[layer], exact[layer], rtol=1e-6, atol=0)


def mixed(net: nn.Module, x: Tensor) -> None:
    output, g = input_gradient(net, x)
    (output.square().sum() + g.square().sum()).backward()


def test_a_pass_in_which_both_meet_is_left_out_with_the_way_out() -> None:
    """Autograd has added them up before a tap sees them."""
    net, x = smooth()
    scorer = Scorer(net, x)
    with scorer:
        mixed(net, x)
        plain(net, x)
    with pytest.warns(UserWarning, match=r"^1 forward pass is left out.*retain_graph=True.*gradient=\"random\""):
        scores = scorer.scores()
    assert scores.samples == 4
    exact = scored(plain)
    assert all(torch.equal(scores[layer], exact[layer]) for layer in exact)


def test_weights_whose_gradients_come_from_several_passes_leave_all_of_them_out() -> None:
    with pytest.raises(RuntimeError, match=r"^every forward pass is left out"):
        scored(wasserstein, importance="molchanov-group", normalize=False)


@pytest.mark.parametrize("step", [mixed, lambda net, x: input_gradient(net, x)[1].square().sum().backward()])
def test_where_no_pass_is_of_first_order_alone_the_error_says_so(step: Step) -> None:
    with pytest.raises(RuntimeError, match=r"^every forward pass is left out.*retain_graph=True"):
        scored(step)


def test_the_way_out_a_probe_before_it() -> None:
    net, x = smooth()
    scorer, other = (Scorer(net, x, gradient="random", seed=1) for _ in range(2))
    with scorer:
        output, g = input_gradient(net, x)
        scorer.probe(output)
        (output.square().sum() + g.square().sum()).backward()
    with other:
        other.probe(net(x))
    one, two = scorer.scores(), other.scores()
    for layer in one:
        torch.testing.assert_close(one[layer], two[layer], rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [penalty_afterwards, penalty_first, mixed, between])
def test_gradients_of_the_loop_stay_bit_for_bit(step: Step) -> None:
    net, x = smooth()
    step(net, x)
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with Scorer(net, x):
        step(net, x)
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True) if p.grad is not None)


def test_an_inner_loop_leaves_the_scores_of_the_outer_pass() -> None:
    net, x = smooth()
    scorer = Scorer(net, x)
    weights = dict(net.named_parameters())
    with scorer:
        inner = functional_call(net, weights, x).square().sum()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {name: weight - 0.01 * g for (name, weight), g in zip(weights.items(), gradients, strict=True)}
        functional_call(net, fast, -x).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^1 forward pass is left out"):
        scores = scorer.scores()
    net.load_state_dict(fast)
    v = 2 * net(-x).detach()
    for name, group in GROUPS.items():
        exact = (oracles.sums(net, group, -x, v) / v.norm(dim=1, keepdim=True)).square().mean(0)
        torch.testing.assert_close(scores[name].double(), exact, rtol=1e-6, atol=0)
