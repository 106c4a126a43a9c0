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
from called_layers import NAMES, ByForward, Forwards, Functions, Net, OneOfThem, Views, inputs
from oracles import untouched
from thinned import thinned
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy


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


class Short(nn.Module):
    """A gated convolution over the steps before, each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=2, groups=8)
        self.expand, self.project = nn.Linear(3, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        before, behind, x = self.expand(x).mT.chunk(3, 1)
        weight = self.conv.weight.squeeze(1)
        y = F.conv1d(before * x, weight.unsqueeze(1), self.conv.bias, padding=2, groups=x.shape[1])[..., :x.shape[2]]
        return self.project((behind * y).mT)


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


@pytest.mark.parametrize(("build", "names"), [
    (Forwards, NAMES), (Functions, NAMES), (OneOfThem, NAMES), (Views, NAMES), (OwnForwards, NAMES),
    (Inside, ["a", "c", "part.conv"])])
def test_from_data_to_a_file(build: type[Net], names: list[str], tmp_path: Path) -> None:
    """By brute force; and what was found is what is found of the same layers, called."""
    result = check(build, inputs(), names, tmp_path)
    assert type(result.model) is build
    if build in (Forwards, Functions, OneOfThem, Views):
        assert trace(noisy(build), inputs()).fingerprint == trace(noisy(Net), inputs()).fingerprint


def test_a_convolution_of_its_own_channels(tmp_path: Path) -> None:
    """Handed on as a matrix."""
    check(Short, inputs()[..., 0].mT, ["expand"], tmp_path)


class Conjugate(nn.Module):
    """Reads the conjugate of a weight, which is a view in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 5, False, dtype=torch.complex128)
        self.c = nn.Linear(5, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.linear(self.a(x).to(torch.complex128), self.b.weight.conj()).imag)


def test_a_view_that_is_read_otherwise_is_not_the_weight() -> None:
    model, x = noisy(Conjugate), torch.randn(2, 3).double()
    trace(model, x)
    assert torch.equal(evaluation_copy(model)(x), model(x))


@pytest.mark.parametrize(("options", "build"), thinned(
    [{"precision": "bfloat16"}, {"reduction": "element"}, {"units": "blocks"}, {"importance": "magnitude-l2"},
     {"ablation": "mean"}], [Forwards, Functions]))
def test_scores_are_those_of_called_layers(build: type[Net], options: dict[str, Any]) -> None:
    x = inputs().float()
    found, expected = (fastscore.score(noisy(kind).float(), [x], progress=False, **options) for kind in (build, Net))
    assert list(found) == list(expected) == NAMES
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("build", [Forwards, Functions])
def test_a_training_loop(build: type[Net]) -> None:
    """Of the user's model, which is of its class afterwards, and trains as without taps."""
    models = [noisy(build).train(), noisy(build).train(), noisy(Net).train()]
    scorers = [None, *(fastscore.Scorer(model, inputs(), importance="taylor-abs") for model in models[1:])]
    for model, scorer in zip(models, scorers, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            if scorer is not None:
                scorer.__enter__()
            model(inputs()).square().sum().backward()
            if scorer is not None:
                scorer.__exit__(None, None, None)
            optimizer.step()
            optimizer.zero_grad()
    assert {type(model) for model in models} == {build, Net}
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    found, expected = (scorer.scores() for scorer in scorers[1:])
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


class Biasless(Functions):
    bias = False


class BiaslessForwards(Forwards):
    bias = False


@pytest.mark.parametrize("build", [Functions, Forwards, Biasless, BiaslessForwards])
def test_means_go_where_they_are_added(build: type[Net]) -> None:
    """A function that is given no bias adds none that comes later."""
    model, x = noisy(build), inputs()
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
    assert list(again) == NAMES


@pytest.mark.parametrize(("build", "repair"), thinned([Forwards, Functions], ["linear", "asymmetric"]))
def test_repairs_are_those_of_called_layers(build: type[Net], repair: str) -> None:
    """Where passes halt at layers, too."""
    x, models = inputs(), [noisy(build), noisy(Net)]
    small = [fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.6, repair=repair,
                             calibration=[x, -x, x / 2]) for model in models]
    assert small[0].report.repairs
    with torch.no_grad():
        torch.testing.assert_close(small[0].model(x), small[1].model(x), rtol=1e-9, atol=1e-9)


def _check_goes_as(called: nn.Module, model: nn.Module) -> None:
    """`model` is scored as `called` is, and computes without channels what it computes with them at zero."""
    x, how = inputs(), {"scope": "layer", "compensate": False}
    expected, found = (fastscore.score(each, [x], progress=False) for each in (called, model))
    small = fastscore.prune(model, found, x, channels=0.6, **how).model  # type: ignore[arg-type]
    with torch.no_grad(), fastscore.mask(model, found, 0.4, x, **how):  # type: ignore[arg-type]
        masked = model(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked, rtol=1e-9, atol=1e-9)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


def _normed(build: type[Net]) -> Net:
    model: Net = noisy(build)
    nn.utils.parametrizations.weight_norm(model.b)
    return model


def test_weights_that_are_computed_are_kept_where_functions_run_them() -> None:
    """They are others in each pass; those of a layer whose forward is run go."""
    assert list(fastscore.score(_normed(OneOfThem), [inputs()], progress=False)) == ["c"]
    _check_goes_as(_normed(Net), _normed(ByForward))


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
    model, x = noisy(Strict), inputs()
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


def _patched(model: Any, x: Tensor) -> Tensor:
    return Functions.forward(model, x)


def test_a_forward_of_an_object_is_followed() -> None:
    model: Any = noisy(Net)
    model.forward = MethodType(_patched, model)
    with untouched(model):
        _check_goes_as(noisy(Net), model)


class Same(Net):
    """A padding that is given by a word, for the layer's own number."""

    def first(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.a.weight, self.a.bias, padding="same"))

    def forward(self, x: Tensor) -> Tensor:
        made = F.relu(self.c(self.second(F.relu(self.first(x)))))
        return self.h(F.conv2d(made, self.c.weight.new_ones(5, 5, 1, 1), padding="valid").mean((2, 3)))


def test_a_word_for_a_padding_is_its_number() -> None:
    assert list(fastscore.score(noisy(Same), [inputs()], progress=False)) == ["a", "b"]
