"""What a call of a layer would not do as the model's code does is kept with the reason, or an error once it happens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from called_layers import NAMES, ByForward, Forwards, Net, OneOfThem, inputs
from oracles import untouched
from torch import Tensor, nn
from whole_way import noisy

import fastscore


class OtherSettings(Net):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 1, 1))


class ReadBesides(Net):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 2, 1)) * self.b.weight.norm()


class Hooked(Forwards):
    """By a hook, which would run."""

    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_hook(lambda layer, args, output: 2 * output)


@pytest.mark.parametrize(("build", "reason"), [
    (OtherSettings, "the code of OtherSettings reads its weight, and does not call it"),
    (ReadBesides, "the code of ReadBesides reads the weight of b as well"),
    (Hooked, "the model's code runs b by b.forward(x), which its hooks do not see: write b(x)")])
def test_what_a_call_would_not_do_is_kept_with_the_reason(build: type[Net], reason: str) -> None:
    """And the rest goes."""
    model, x = noisy(build), inputs()
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["c"]
    assert scores.skipped["b"] == reason


def _times(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _less(layer: nn.Module, args: Any) -> Any:
    return args[0] - 1,


@pytest.mark.parametrize(("build", "reason"), [
    (OneOfThem, "the code of OneOfThem reads its weight, and does not call it"),
    (ByForward, "the model's code runs b by b.forward(x), which its hooks do not see: write b(x)")])
@pytest.mark.parametrize("set_hook", [lambda layer: layer.register_forward_hook(_times),
                                      lambda layer: layer.register_forward_pre_hook(_less)])
def test_hooks_that_do_not_run_for_the_user_never_run(build: type[Net], reason: str, set_hook: Any) -> None:
    """Of a layer that is not called: the model is the one without them, and the layer is kept."""
    model, plain, x = noisy(build), noisy(build), inputs()
    set_hook(model.b)
    scores, expected = (fastscore.score(each, [x], progress=False) for each in (model, plain))
    assert list(scores) == ["c"]
    assert scores.skipped["b"] == reason
    torch.testing.assert_close(scores["c"], expected["c"])
    with torch.no_grad(), fastscore.mask(model, scores, 0, x):
        assert torch.equal(model(x), plain(x))


def test_a_hook_that_is_set_later_is_an_error() -> None:
    model, x = noisy(OneOfThem), inputs()
    scorer = fastscore.Scorer(model, x)
    handle = model.b.register_forward_hook(_times)
    with pytest.raises(ValueError, match=r"^b: a hook has been set on it, which the code of OneOfThem does not run"):
        scorer.__enter__()
    handle.remove()
    with scorer:
        model(x).sum().backward()
    assert set(scorer.scores()) == set(NAMES)


class BySize(Net):
    def second(self, x: Tensor) -> Tensor:
        wide = 1 + (x.shape[-1] > 10)
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 2, wide, wide))


def test_what_another_batch_has_it_do_is_an_error() -> None:
    """A tap would not see it. The model is not changed by it, and runs on both as long as nobody looks."""
    model, x = noisy(BySize), inputs()
    wide, y = torch.cat([x, x], 3), model(inputs())
    with untouched(model), pytest.raises(ValueError, match=r"^batches: .* b: the code of BySize runs it by conv2d\(\)"):
        fastscore.score(model, [x, wide], progress=False)
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model), fastscore.Scorer(model, x), pytest.raises(RuntimeError, match=r"^b: the code of BySize"):
        model(wide)
    with untouched(model), fastscore.mask(model, scores, 0.3, x), pytest.raises(RuntimeError, match="write b"):
        model(wide)
    assert torch.equal(model(x), y)
    assert model(wide).isfinite().all()


def _run_before(model: Any, args: Any) -> Any:
    return torch.cat([args[0], model.b.forward(F.relu(model.a(args[0]))).mean() * args[0]])[:len(args[0])],


def test_a_hook_that_runs_a_layer_is_told_so() -> None:
    model, x = noisy(Net), inputs()
    model.register_forward_pre_hook(_run_before)
    scores = fastscore.score(model, [x], progress=False)
    assert scores.skipped["b"] == "the model's code runs b by b.forward(x), which its hooks do not see: write b(x)"
