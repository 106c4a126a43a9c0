"""Layers that a module's code runs by a function of their parameters, or past their call, go as those do that are
called."""

import copy
import inspect
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


class Net(nn.Module):
    """Three convolutions, which are called."""

    bias = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=self.bias), nn.BatchNorm2d(8)
        self.b, self.slopes = nn.Conv2d(8, 6, 3, 2, 1, bias=self.bias), nn.PReLU(6)
        self.c, self.h = nn.Conv2d(6, 5, 1, bias=self.bias), nn.Linear(5, 2)

    def first(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))

    def second(self, x: Tensor) -> Tensor:
        return self.slopes(self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.c(self.second(F.relu(self.first(x))))).mean((2, 3)))


class Forwards(Net):
    """Past their call."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes.forward(self.b.forward(F.relu(self.norm.forward(self.a.forward(x)))))
        return self.h.forward(F.relu(self.c.forward(x)).mean((2, 3)))


class Functions(Net):
    """Of what the layers hold."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.conv2d(x, self.a.weight, self.a.bias, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, eps=norm.eps)
        x = F.conv2d(F.relu(x), weight=self.b.weight, bias=self.b.bias, stride=(2, 2), padding=(1,))
        x = F.conv2d(F.prelu(x, self.slopes.weight), self.c.weight, self.c.bias)
        return F.linear(F.relu(x).mean((2, 3)), self.h.weight, self.h.bias)


class Padding(nn.Conv2d):
    """Pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class OwnForwards(Forwards):
    """Of a class of its own; and with a normalisation over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.over = Padding(8, 6, 3, 2), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes.forward(self.b.forward(F.relu(self.norm.forward(self.a.forward(x)))))
        return self.h(self.over.forward(F.relu(self.c(x)).mean((2, 3))))


class OneOfThem(Net):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 2, 1))


class Inside(Net):
    """By a module that holds them; and one of them is called as well."""

    class Part(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.conv, self.slopes = net.b, net.slopes

        def forward(self, x: Tensor) -> Tensor:
            by_function = F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride, self.conv.padding)
            return self.slopes(self.conv(x)) + torch.tanh(by_function)

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part(self)
        del self.b, self.slopes

    def second(self, x: Tensor) -> Tensor:
        return self.part(x)


_NAMES = ["a", "b", "c"]


def _x() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("build", "names"), [
    (Forwards, _NAMES), (Functions, _NAMES), (OneOfThem, _NAMES), (OwnForwards, _NAMES),
    (Inside, ["a", "c", "part.conv"])])
def test_from_data_to_a_file(build: type[Net], names: list[str], tmp_path: Path) -> None:
    """By brute force; and what was found is what is found of the same layers, called."""
    result = check(build, _x(), names, tmp_path)
    assert type(result.model) is build
    if build in (Forwards, Functions, OneOfThem):
        assert trace(noisy(build), _x()).fingerprint == trace(noisy(Net), _x()).fingerprint


@pytest.mark.parametrize("build", [Forwards, Functions])
@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"reduction": "element"}, {"units": "blocks"},
                                     {"importance": "magnitude-l2"}, {"ablation": "mean"}])
def test_scores_are_those_of_called_layers(build: type[Net], options: dict[str, Any]) -> None:
    x = _x().float()
    found, expected = (fastscore.score(noisy(kind).float(), [x], progress=False, **options) for kind in (build, Net))
    assert list(found) == list(expected) == _NAMES
    for name in _NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("build", [Forwards, Functions])
def test_a_training_loop(build: type[Net]) -> None:
    """Of the user's model, which is of its class afterwards, and trains as without taps."""
    models = [noisy(build).train(), noisy(build).train(), noisy(Net).train()]
    scorers = [None, *(fastscore.Scorer(model, _x(), importance="taylor-abs") for model in models[1:])]
    for model, scorer in zip(models, scorers, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            if scorer is not None:
                scorer.__enter__()
            model(_x()).square().sum().backward()
            if scorer is not None:
                scorer.__exit__(None, None, None)
            optimizer.step()
            optimizer.zero_grad()
    assert {type(model) for model in models} == {build, Net}
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    found, expected = (scorer.scores() for scorer in scorers[1:])
    for name in _NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


class Biasless(Functions):
    bias = False


class BiaslessForwards(Forwards):
    bias = False


@pytest.mark.parametrize("build", [Functions, Forwards, Biasless, BiaslessForwards])
def test_means_go_where_they_are_added(build: type[Net]) -> None:
    """A function that is given no bias adds none that comes later."""
    model, x = noisy(build), _x()
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        result = fastscore.prune(model, scores, x, channels=0.6, scope="layer")
        with torch.no_grad(), fastscore.mask(model, scores, 0.4, x, scope="layer"):
            masked = model(x)
        small = fastscore.prune(model, scores, x, channels=0.6, calibration=[x, -x], repair="linear").model
    assert (result.model.b.bias is not None) == (build is not Biasless)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), masked, rtol=1e-9, atol=1e-9)
    assert small(x).isfinite().all()
    again = fastscore.score(result.model, [x], progress=False)  # of what is smaller, too
    assert list(again) == _NAMES


@pytest.mark.parametrize("build", [Forwards, Functions])
@pytest.mark.parametrize("repair", ["linear", "asymmetric"])
def test_repairs_are_those_of_called_layers(build: type[Net], repair: str) -> None:
    """Where passes halt at layers, too."""
    x, models = _x(), [noisy(build), noisy(Net)]
    small = [fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.6, repair=repair,
                             calibration=[x, -x, x / 2]) for model in models]
    assert small[0].report.repairs
    with torch.no_grad():
        torch.testing.assert_close(small[0].model(x), small[1].model(x), rtol=1e-9, atol=1e-9)


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
    model, x = noisy(build), _x()
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["c"]
    assert scores.skipped["b"] == reason


class ByForward(OneOfThem):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(self.b.forward(x))


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
    model, plain, x = noisy(build), noisy(build), _x()
    set_hook(model.b)
    scores, expected = (fastscore.score(each, [x], progress=False) for each in (model, plain))
    assert list(scores) == ["c"]
    assert scores.skipped["b"] == reason
    torch.testing.assert_close(scores["c"], expected["c"])
    with torch.no_grad(), fastscore.mask(model, scores, 0, x):
        assert torch.equal(model(x), plain(x))


def test_a_hook_that_is_set_later_is_an_error() -> None:
    model, x = noisy(OneOfThem), _x()
    scorer = fastscore.Scorer(model, x)
    handle = model.b.register_forward_hook(_times)
    with pytest.raises(ValueError, match=r"^b: a hook has been set on it, which the code of OneOfThem does not run"):
        scorer.__enter__()
    handle.remove()
    with scorer:
        model(x).sum().backward()
    assert set(scorer.scores()) == set(_NAMES)


def _normed(build: type[Net]) -> Net:
    model: Net = noisy(build)
    nn.utils.parametrizations.weight_norm(model.b)
    return model


def test_weights_that_are_computed_are_kept_where_functions_run_them() -> None:
    """They are others in each pass; those of a layer whose forward is run go."""
    x = _x()
    assert list(fastscore.score(_normed(OneOfThem), [x], progress=False)) == ["c"]
    found, expected = (fastscore.score(_normed(build), [x], progress=False) for build in (ByForward, Net))
    model = _normed(ByForward)
    with torch.no_grad(), fastscore.mask(model, found, 0.4, x, scope="layer", compensate=False):
        masked = model(x)
    small = fastscore.prune(model, found, x, channels=0.6, scope="layer", compensate=False).model
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked, rtol=1e-9, atol=1e-9)
    for name in _NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


class BySize(Net):
    def second(self, x: Tensor) -> Tensor:
        wide = 1 + (x.shape[-1] > 10)
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 2, wide, wide))


def test_what_another_batch_has_it_do_is_an_error() -> None:
    """A tap would not see it. The model is not changed by it, and runs on both as long as nobody looks."""
    model, x = noisy(BySize), _x()
    wide, y = torch.cat([x, x], 3), model(_x())
    with untouched(model), pytest.raises(RuntimeError, match=r"^b: the code of BySize runs it by conv2d\(\)"):
        fastscore.score(model, [x, wide], progress=False)
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model), fastscore.Scorer(model, x), pytest.raises(RuntimeError, match=r"^b: the code of BySize"):
        model(wide)
    with untouched(model), fastscore.mask(model, scores, 0.3, x), pytest.raises(RuntimeError, match="write b"):
        model(wide)
    assert torch.equal(model(x), y)
    assert model(wide).isfinite().all()


class Strict(Functions):
    """Of a class that knows its own subclasses, attributes and objects."""

    def __init_subclass__(cls, *, tag: str, **others: Any) -> None:
        raise AssertionError(tag)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "__class__"
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Of nothing else."""
        assert type(self) is Strict
        return super().forward(x)


def test_classes_stay_and_copies_are_what_they_are_without_taps() -> None:
    model, x = noisy(Strict), _x()
    scores = fastscore.score(model, [x], progress=False)
    scorer = fastscore.Scorer(model, x)
    with untouched(model), scorer:
        copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert list(inspect.signature(model.forward).parameters) == ["x"]
    with fastscore.mask(model, scores, 0.3, x):
        masked = copy.deepcopy(model)
        assert torch.equal(masked(x), model(x))
    for each in (copied, read, pickle.loads(pickle.dumps(copied))):
        assert type(each) is Strict
        assert torch.equal(each(x), model(x))
        torch.testing.assert_close(dict(fastscore.score(each, [x], progress=False)), dict(scores))


def _run_before(model: Any, args: Any) -> Any:
    return torch.cat([args[0], model.b.forward(F.relu(model.a(args[0]))).mean() * args[0]])[:len(args[0])],


def test_a_hook_that_runs_a_layer_is_told_so() -> None:
    model, x = noisy(Net), _x()
    model.register_forward_pre_hook(_run_before)
    scores = fastscore.score(model, [x], progress=False)
    assert scores.skipped["b"] == "the model's code runs b by b.forward(x), which its hooks do not see: write b(x)"


def _patched(model: Any, x: Tensor) -> Tensor:
    return Functions.forward(model, x)


def test_a_forward_of_an_object_is_followed() -> None:
    model, x = noisy(Net), _x()
    model.forward = MethodType(_patched, model)
    with untouched(model):
        found, expected = (fastscore.score(each, [x], progress=False) for each in (model, noisy(Net)))
        small = fastscore.prune(model, found, x, channels=0.6, scope="layer", compensate=False).model
        with torch.no_grad(), fastscore.mask(model, found, 0.4, x, scope="layer", compensate=False):
            masked = model(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked, rtol=1e-9, atol=1e-9)
    for name in _NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


class Same(Net):
    """A padding that is given by a word, for the layer's own number."""

    def first(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.a.weight, self.a.bias, padding="same"))

    def forward(self, x: Tensor) -> Tensor:
        made = F.relu(self.c(self.second(F.relu(self.first(x)))))
        return self.h(F.conv2d(made, self.c.weight.new_ones(5, 5, 1, 1), padding="valid").mean((2, 3)))


def test_a_word_for_a_padding_is_its_number() -> None:
    assert list(fastscore.score(noisy(Same), [_x()], progress=False)) == ["a", "b"]
