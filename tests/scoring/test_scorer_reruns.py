"""Drop-in scores of models that run their layers again, or compiled: activation checkpointing, torch.compile."""

from typing import Any

import pytest
import torch
from loops import RESIDUAL, assert_exact, assert_same, brute_force, measured
from network_modules import Residual
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace


class Checkpointed(Residual):
    reentrant = True
    first = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block1, x, use_reentrant=self.reentrant) if self.first else self.block1(x)
        return self.head(checkpoint(self.block2, x, use_reentrant=self.reentrant))


def checkpointed(reentrant: bool) -> nn.Module:
    model = Checkpointed().double().eval()
    model.load_state_dict(RESIDUAL.model().state_dict())
    model.reentrant = reentrant
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_measured(reentrant: bool) -> None:
    model, x = checkpointed(reentrant), RESIDUAL.inputs(6)
    assert trace(model, x).fingerprint == trace(RESIDUAL.model(), x).fingerprint
    assert_exact(measured(model, x), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()))
    assert_same(measured(model, x[:2], x[2:]), measured(RESIDUAL.traced(), x[:2], x[2:]))
    assert_same(fastscore.score(model, [x], progress=False), fastscore.score(RESIDUAL.traced(), [x], progress=False))


def test_two_passes_in_one_backward_pass_through_checkpoints() -> None:
    x = RESIDUAL.inputs(6)
    model = checkpointed(reentrant=False)
    scorer = Scorer(model, x)
    with scorer:
        (model(x[:2]).square().sum() + model(x[2:]).square().sum()).backward()
    assert_same(scorer.scores(), measured(RESIDUAL.traced(), x[:2], x[2:]))
    model = checkpointed(reentrant=True)
    scorer = Scorer(model, x)
    with scorer:
        loss = model(x[:2]).square().sum() + model(x[2:]).square().sum()
        with pytest.raises(RuntimeError, match=r"covers 2 forward passes.*use_reentrant=False"):
            loss.backward()


def test_probes_through_checkpoints() -> None:
    x = RESIDUAL.inputs()
    model, reentrant, plain = checkpointed(reentrant=False), checkpointed(reentrant=True), RESIDUAL.traced()
    scorer, expected = Scorer(model, x, gradient="random"), Scorer(plain, x, gradient="random")
    with scorer, expected:
        scorer.probe(model(x))
        expected.probe(plain(x))
    assert_same(scorer.scores(), expected.scores())
    scorer = Scorer(reentrant, x, gradient="random")
    with scorer:
        scorer.probe(reentrant(x))
    assert list(scorer.scores()) == ["block2.conv2"]  # behind the last checkpoint
    assert "use_reentrant=True" in scorer.scores().skipped["block1.conv1"]
    reentrant.first = False
    scorer = Scorer(reentrant, x, gradient="random")
    with scorer, pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        scorer.probe(reentrant(x))


def test_a_gradient_penalty_through_checkpoints_is_no_training_step() -> None:
    model, x = checkpointed(reentrant=False), RESIDUAL.inputs().requires_grad_()
    scorer = Scorer(model, x.detach())
    with scorer:
        loss = model(x).square().sum()
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    assert_same(scorer.scores(), measured(RESIDUAL.traced(), x.detach()))


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Any:
    yield
    torch.compiler.reset()


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))
    return nn.Sequential(nn.Linear(3, 6), inner, nn.ReLU(), nn.Linear(5, 2)).double()


POINTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("whole", "backend"), [(True, "eager"), (True, "aot_eager"), (False, "eager")])
def test_a_model_compiled_around_its_taps(whole: bool, backend: str) -> None:
    model, x = perceptron(), POINTS
    expected = measured(model, x[:3], x[3:])
    scorer = Scorer(model, x)
    running = torch.compile(model, backend=backend) if whole else model
    if not whole:
        model[1].compile(backend=backend)
    with scorer:
        for part in (x[:3], x[3:]):
            running(part).square().sum().backward()
    assert_same(scorer.scores(), expected)
    running(x).square().sum().backward()  # without the taps: no trace of them, no error
    assert scorer.scores().samples == 6


def test_probes_of_a_compiled_model() -> None:
    model, x = perceptron(), POINTS
    scorer, plain = (Scorer(model, x, gradient="random") for _ in range(2))
    with plain:
        plain.probe(model(x))
    with scorer:
        scorer.probe(torch.compile(model, backend="eager")(x))
    assert_same(scorer.scores(), plain.scores())
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    freeing = Scorer(model, x, gradient="random")
    with freeing, pytest.raises(RuntimeError, match=r"^output: torch\.compile .*donated_buffer = False"):
        freeing.probe(torch.compile(model, backend="aot_eager")(x))


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_was_compiled_and_ran_before_is_refused_at_its_first_backward_pass(whole: bool) -> None:
    model, x = perceptron(), POINTS
    running = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model[1].compile(backend="eager")
    running(x).square().sum().backward()
    scorer = Scorer(model, x)
    layer = "3" if whole else "1.1"
    with scorer, pytest.raises(RuntimeError, match=rf"^{layer}: a backward pass reached its weight.*torch\.compiler"):
        running(x).square().sum().backward()
    with scorer:
        torch.compiler.reset()  # the way out that the message names
        running(x).square().sum().backward()
    assert_same(scorer.scores(), measured(perceptron(), x))
