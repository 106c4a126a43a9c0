"""A scorer used wrongly says so, and counts nothing that was not measured whole."""

import gc
import math
import weakref
from typing import Literal

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

from fastscore import Scorer

RESIDUAL = NETWORKS["residual"]


def test_used_wrongly() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    with untouched(model):
        scorer = Scorer(model, x, gradient="random")
        with pytest.raises(RuntimeError, match="no backward pass has been measured"):
            scorer.scores()
        output = model(x)
        with pytest.raises(RuntimeError, match="no forward pass has been seen"):
            scorer.probe(output)
        with scorer, pytest.raises(RuntimeError, match="attached already"):
            scorer.attach()
        with scorer:
            with pytest.raises(RuntimeError, match="no forward pass has been seen"):
                scorer.probe(output)
            first = model(x)
            model(x)
            with pytest.raises(RuntimeError, match="not the output of the latest forward pass"):
                scorer.probe(first)
            with torch.no_grad(), pytest.raises(RuntimeError, match="gradients enabled"):
                scorer.probe(model(x))
            output = model(x)
            torch.autograd.grad(output.sum(), list(model.parameters()))
            with pytest.raises(RuntimeError, match=r"its graph is gone: .*before loss\.backward"):
                scorer.probe(output)
            with pytest.raises(RuntimeError, match=r"^output: "):
                scorer.probe(model(x).detach())
            with pytest.raises(ValueError, match=r"^output: it has 3 rows for 4 samples"):
                scorer.probe(model(x)[:3])
        with pytest.raises(RuntimeError, match="no backward pass has been measured"):
            scorer.scores()
        reading = Scorer(model, x, gradient="loss")
        with reading, pytest.raises(RuntimeError, match='gradient="random"'):
            reading.probe(model(x))
        with pytest.raises(ValueError, match=r"^gradient: 'lose'"):
            Scorer(model, x, gradient="lose")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^distribution: 'uniform' is none of"):
            Scorer(model, x, gradient="random", distribution="uniform")


def test_gradients_taken_with_autograd_grad_alone_are_not_counted() -> None:
    """torch.autograd.grad(loss, parameters) fills no gate: nothing measured, rather than zeros."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    scorer = Scorer(model, x)
    with scorer:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with pytest.raises(RuntimeError, match="no backward pass has been measured"):
        scorer.scores()


def test_hooks_on_a_model_that_was_compiled_before_are_missed_aloud() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x).sum().backward()
    scorer = Scorer(model, x)
    with scorer, pytest.raises(RuntimeError, match=r"^2: a backward pass reached its weight, .*torch\.compile"):
        compiled(x).sum().backward()


def test_nan_in_a_loop_is_named() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    scorer = Scorer(model, x)
    with scorer:
        (model(x).sum() * math.nan).backward()
    with pytest.raises(FloatingPointError, match=r"^the output: NaN or infinity"):
        scorer.scores()


def broken_loop(scorer: Scorer, model: nn.Module, x: Tensor, error: BaseException) -> None:
    with scorer:
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)
        model(x)
        raise error


def test_an_exception_in_the_loop_removes_the_hooks_and_keeps_what_was_measured() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    once = Scorer(model, x)
    with once:
        model(x).square().sum().backward()
    model.zero_grad(set_to_none=True)
    for error in (RuntimeError("mine"), KeyboardInterrupt()):
        scorer = Scorer(model, x)
        with untouched(model):
            with pytest.raises(type(error)) as caught:
                broken_loop(scorer, model, x, error)
            assert caught.value is error
        for layer in once.scores():
            assert torch.equal(scorer.scores()[layer], once.scores()[layer])


def test_an_exception_in_the_backward_pass_leaves_no_half_measured_pass() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    scorer = Scorer(model, x)

    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError("in a hook of the user's")

    def break_stem(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(fail)

    handle = model.block1.register_forward_hook(break_stem)
    with pytest.raises(ZeroDivisionError), scorer:
        model(x).square().sum().backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="no backward pass has been measured"):
        scorer.scores()


@pytest.mark.parametrize("gradient", ["loss", "random"])
def test_a_layer_that_is_replaced_meanwhile_is_named(gradient: Literal["loss", "random"]) -> None:
    """Its taps would have seen some of the samples that are counted."""
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)), torch.randn(5, 4)
    scorer = Scorer(model, x, gradient=gradient)

    def measure() -> None:
        output = model(x)
        if gradient == "random":
            scorer.probe(output)
        output.square().sum().backward()

    with scorer:
        measure()
        model[1] = nn.Linear(6, 3)
        with pytest.raises(RuntimeError, match=r"^1: it was replaced since the scorer was attached"):
            measure()
    assert scorer.scores().samples == 5
    model(x).sum().backward()


class Around(nn.Module):
    """As an adapter is."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.beside(x)


def test_what_is_put_around_a_layer_meanwhile_is_named() -> None:
    """It may read channels, too, past the tap."""
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)), torch.randn(5, 4)
    scorer = Scorer(model, x)
    with scorer:
        model[1] = Around(model[1])
        with pytest.raises(RuntimeError, match=r"^1: a Around was put around it since .* make one of the model as it"):
            model(x)
    with (scorer := Scorer(model, x)):
        model(x).square().sum().backward()
    twice = nn.Sequential(model[0], nn.Linear(6, 6))
    twice[1].weight.data, twice[1].bias.data = (
        torch.cat([getattr(layer, name).data for layer in (model[1].layer, model[1].beside)])
        for name in ("weight", "bias"))
    with Scorer(whole := nn.Sequential(twice, _Halves()), x) as expected:
        whole(x).square().sum().backward()
    torch.testing.assert_close(scorer.scores()["0.0"], expected.scores()["0.0.0"])


class _Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + x[:, 3:]


@pytest.mark.parametrize("importance", ["taylor-sq", "molchanov-group"])
def test_a_scorer_that_is_detached_holds_no_layer_that_the_model_has_let_go(importance: str) -> None:
    """It holds the model, which it may be attached to again."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    scorer = Scorer(model, x, importance=importance, normalize=importance == "taylor-sq")
    with scorer:
        model(x).square().sum().backward()
    expected = scorer.scores()
    held = [weakref.ref(model[0]), weakref.ref(model[2])]
    model[0], model[2] = nn.Linear(4, 6), nn.Linear(6, 3)
    gc.collect()
    assert not [ref() for ref in held if ref() is not None]
    torch.testing.assert_close(scorer.scores()["0"], expected["0"])
