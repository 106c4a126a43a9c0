"""Batches, and what models return, in the containers that people use: each reaches the model as what it was."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.batches.parts import first_samples, map_tensors

Pair = namedtuple("Pair", ["image", "label"])


@dataclass(frozen=True)
class Sample:
    """A batch of a dataclass."""

    image: Tensor
    label: Tensor | None = None


@dataclass
class LayerByLayer:
    """A model's configuration that answers for all layers at once only where they are alike, as transformers' may."""

    width: int = 8
    heads: int = 2

    def __getattribute__(self, name: str) -> Any:
        if name == "heads":
            raise ValueError("heads: they differ from layer to layer")
        return super().__getattribute__(name)


class Encoding(UserDict):
    """A mapping whose values are attributes too, as tokenizers' BatchEncoding is."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass
class Returned:
    """What a model returns."""

    logits: Tensor
    loss: Tensor | None = None


NET = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


class Takes(nn.Module):
    """Takes a batch whole, by its attributes, and returns what `wrap` makes of the output."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.net, self.wrap = NET, wrap

    def forward(self, batch: Any) -> Any:
        return self.wrap(self.net(batch.image))


X = torch.randn(3, 4)
BATCHES = {"dataclass": Sample(X), "namedtuple": Pair(X, torch.arange(3)), "mapping": Encoding(image=X)}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_reaches_the_model_as_what_it_was(name: str) -> None:
    """Scored, cut and run, with the scores of the tensor alone."""
    batch, forward = BATCHES[name], lambda model, batch: model(batch)
    expected, model = fastscore.score(NET, [X], progress=False), Takes()
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    assert list(scores) == ["net.0", "net.2"]
    assert all(torch.equal(scores[f"net.{layer}"], expected[layer]) for layer in expected)
    result = fastscore.prune(model, scores, batch, channels=0.5, calibration=[batch, batch], forward=forward)
    assert result.report.channels == (11, 5)
    halves = first_samples(batch, 2)
    assert type(halves) is type(batch)
    assert len(halves.image) == 2
    assert len(batch.image) == 3


def test_a_dataclass_is_what_a_model_is_called_on() -> None:
    """As a tensor is; of a tuple it is the first, of a mapping all by their names."""
    assert torch.equal(call_model(Takes(), Sample(X)), NET(X))
    assert list(fastscore.score(Takes(), [Sample(X)], progress=False)) == ["net.0", "net.2"]


@pytest.mark.parametrize("wrap", [Returned, lambda y: Pair(y, None), lambda y: (y, 3, "x", y.argmax(1)),
                                  lambda y: OrderedDict(a={"b": [y]}, c=None)])
def test_the_one_tensor_in_what_is_returned(wrap: Callable[[Tensor], Any]) -> None:
    """Is found, whatever holds it."""
    assert list(fastscore.score(Takes(wrap), [Sample(X)], progress=False)) == ["net.0", "net.2"]


def test_several_tensors_are_named() -> None:
    """By the attributes that hold them."""
    with pytest.raises(TypeError, match=r"returns Returned with \.logits \[1, 3\], \.loss \[1, 3\]; .*pass forward="):
        fastscore.score(Takes(lambda y: Returned(y, y)), [Sample(X)], progress=False)


def test_other_containers_keep_their_kind() -> None:
    """And what is no tensor."""
    batch = {"a": [X, 1], "b": (X,), "c": OrderedDict(d=X), "e": None}
    twice = map_tensors(lambda tensor: 2 * tensor, batch)
    assert [type(value) for value in twice.values()] == [list, tuple, OrderedDict, type(None)]
    assert torch.equal(twice["c"]["d"], 2 * X)
    assert batch["c"]["d"] is X


def test_fields_that_cannot_be_read_are_no_tensors() -> None:
    """A model that keeps such a configuration is scored and cut as any other."""
    model = Takes()
    model.config = LayerByLayer()
    scores = fastscore.score(model, [Sample(X)], progress=False)
    assert list(scores) == ["net.0", "net.2"]
    result = fastscore.prune(model, scores, Sample(X), channels=0.5)
    assert result.model(Sample(X)).shape == (len(X), 3)
