"""s[n, c] against brute force, and taps that leave no trace."""

import copy

import oracles
import pytest
import torch
import torch.nn.functional as F
from network_modules import BasicBlock, Head, Residual
from networks import NETWORKS, randomize
from oracles import untouched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastscore import Scorer
from fastscore.taps.gates import TapPoint
from fastscore.taps.measures import SUMS
from fastscore.taps.taps import Taps

EVERY_NETWORK = pytest.mark.parametrize("name", list(NETWORKS))


def output_gradient(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max() / exact.abs().max())


@EVERY_NETWORK
def test_sums_are_the_derivative_by_a_gate_at_every_consumer(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs()
    v = output_gradient(model(x))
    found = oracles.sums_of_each_sample(Scorer(model, x, importance="taylor", gradient="random"), model, x, v)
    assert set(found) == set(network.groups)
    for group, spec in network.groups.items():
        exact = oracles.sums(model, spec, x, v)
        assert exact.abs().min(0).values.max() > 0
        assert relative_error(found[group], exact) < 1e-10, group


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "mobile", "flattening", "grouped", "unet", "tokens"])
def test_the_oracle_agrees_with_finite_differences(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(2)
    v = output_gradient(model(x))
    for group, spec in network.groups.items():
        exact = oracles.sums(model, spec, x, v)
        assert relative_error(oracles.finite_difference(model, spec, x, v), exact) < 1e-6, group


def test_what_leaves_the_producers_arrives_at_the_consumers() -> None:
    """Euler: between a BatchNorm and the next convolution all is homogeneous of degree 1 (ReLU, add, average)."""
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(8)
    v = output_gradient(model(x))
    scorer = Scorer(model, x, importance="taylor", gradient="random")
    found = oracles.sums_of_each_sample(scorer, model, x, v)
    producers = {"stem.0": ["stem.1", "block1.bn2"], "block1.conv1": ["block1.bn1"], "block2.conv1": ["block2.bn1"],
                 "block2.conv2": ["block2.bn2", "block2.shortcut.1"]}
    made: dict[str, Tensor] = {}

    def keep(norm: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            made[norm] = output.clone()
            made[norm].retain_grad()
            return made[norm]

        return hook

    copied = copy.deepcopy(model)
    for norms in producers.values():
        for norm in norms:
            copied.get_submodule(norm).register_forward_hook(keep(norm))
    (copied(x) * v).sum().backward()
    for group, norms in producers.items():
        sent = sum((made[norm].detach() * made[norm].grad).sum((2, 3)) for norm in norms)
        assert relative_error(found[group], sent) < 1e-12, group


def test_a_gate_sees_its_own_consumer_alone() -> None:
    """Two consumers read one tensor; each gate gets what comes back through its own."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)}).double()
    model.forward = lambda x: model["a"](x) + 2 * model["b"](x)  # type: ignore[method-assign]
    x, v = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    with Taps(model, {"a": TapPoint(-1), "b": TapPoint(-1)}, SUMS) as taps:
        sums, _ = taps.propagate(model(x), v)
    found = {layer: tensor[0] for layer, tensor in sums}
    torch.testing.assert_close(found["a"], x * (v @ model["a"].weight.detach()))
    torch.testing.assert_close(found["b"], 2 * x * (v @ model["b"].weight.detach()))


class Classifier(nn.Module):
    """A ResNet with what training brings along: BatchNorm in training mode, dropout, three consumers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.branches = nn.ModuleList(nn.Conv2d(6, 6, size, padding=size // 2) for size in (1, 3, 5))
        self.block, self.dropout, self.head = BasicBlock(6, 5, 6, inplace=True), nn.Dropout(0.2), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branches[0](x) + self.branches[1](x) * self.branches[2](x)
        return self.head(self.dropout(self.block(x)))


def train(scored: str | None, steps: int = 3, memory_format: torch.memory_format = torch.contiguous_format
          ) -> list[Tensor]:
    """Gradients of every step, then the parameters and buffers, of a training run with or without a scorer."""
    torch.manual_seed(0)
    model = randomize(Classifier()).train().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(16, 3, 8, 8).to(memory_format=memory_format)
    y = torch.randint(0, 4, (16,))
    scorer = Scorer(model, x, gradient=scored, importance="taylor-abs") if scored else None
    if scorer:
        scorer.attach()
    trace = []
    for _ in range(steps):
        output = model(x)
        if scored == "random":
            scorer.probe(output)
            scorer.probe(output)
        F.cross_entropy(output, y).backward()
        trace += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x[:3])  # an evaluation in between
    if scorer:
        scorer.detach()
        assert scorer.scores().samples == steps * 16
    return trace + [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scored", ["loss", "random"])
def test_training_is_bit_for_bit_the_same(scored: str, memory_format: torch.memory_format) -> None:
    for ours, plain in zip(train(scored, memory_format=memory_format), train(None, memory_format=memory_format),
                           strict=True):
        assert torch.equal(ours, plain)


def test_probe_leaves_every_gradient_alone() -> None:
    network = NETWORKS["inplace"]
    model, x = network.traced(), network.inputs().requires_grad_()
    model(x).square().sum().backward()
    scorer = Scorer(model, x.detach(), gradient="random")
    kept = x.grad.clone()
    with untouched(model), scorer:
        scorer.probe(model(x))
    assert torch.equal(x.grad, kept)


@EVERY_NETWORK
def test_taps_come_and_go(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced().train(), network.inputs()
    with untouched(model):
        scorer = Scorer(model, x, gradient="random")
        for _ in range(2):
            scorer.attach()
            scorer.detach()
        scorer.detach()


def test_a_copy_made_while_tapped_is_quiet() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs()
    scorer = Scorer(model, x, importance="taylor-abs")
    with scorer:
        copied = copy.deepcopy(model)
        model(x).square().sum().backward()
        copied(x).square().sum().backward()
    once = Scorer(model, x, importance="taylor-abs")
    with once:
        model(x).square().sum().backward()
    assert scorer.scores().samples == once.scores().samples
    assert all(torch.equal(scorer.scores()[layer], once.scores()[layer]) for layer in once.scores())


class Checkpointed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (self.block1, self.block2):
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("gradient", ["loss", "random"])
def test_activation_checkpointing_changes_nothing(gradient: str) -> None:
    torch.manual_seed(0)
    model = randomize(Checkpointed()).double().eval()
    plain = Residual().double().eval()
    plain.load_state_dict(model.state_dict())
    x = NETWORKS["residual"].inputs()
    found = []
    for network in (model, plain):
        scorer = Scorer(plain, x, gradient=gradient)
        scorer = Scorer(network, x, gradient=gradient)
        with scorer:
            for _ in range(2):
                output = network(x)
                if gradient == "random":
                    scorer.probe(output)
                else:
                    output.square().sum().backward()
        found.append(scorer.scores())
    for layer in found[1]:
        torch.testing.assert_close(found[0][layer], found[1][layer])


def test_two_passes_before_one_backward_both_count() -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(6)
    both, apart = (Scorer(model, x, importance="taylor-abs") for _ in range(2))
    with both:
        (model(x[:2]).square().sum() + model(x[2:]).square().sum()).backward()
    with apart:
        for part in (x[:2], x[2:]):
            model(part).square().sum().backward()
    assert both.scores().samples == apart.scores().samples == 6
    for layer in both.scores():
        torch.testing.assert_close(both.scores()[layer], apart.scores()[layer])


def test_two_losses_sent_back_one_after_the_other_are_their_sum() -> None:
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs(6)
    apart, joint = (Scorer(model, x, importance="taylor-abs") for _ in range(2))
    with apart:
        output = model(x)
        output.square().sum().backward(retain_graph=True)
        output.exp().sum().backward()
    with joint:
        output = model(x)
        (output.square().sum() + output.exp().sum()).backward()
    for layer in joint.scores():
        torch.testing.assert_close(apart.scores()[layer], joint.scores()[layer])
