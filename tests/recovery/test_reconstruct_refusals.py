"""reconstruct(), curve() and prune(calibration=): what is refused, before anything has changed."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import untouched
from repairing import scored
from torch import Tensor, nn

import fastscore


class Shuffled:
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


WRONG = [
    (lambda batches: [], ValueError, "calibration: there is no batch"),
    (lambda batches: [batches[0][:0]], ValueError, "calibration: there is no batch"),
    (lambda batches: [batches[0][:1]], ValueError, "calibration: 1 sample"),
    (iter, ValueError, "calibration: it can be read only once"),
    (lambda batches: batches[0], TypeError, "calibration: one tensor"),
    (lambda batches: [batch[:, :1] for batch in batches], ValueError, "calibration: the model cannot take"),
    (lambda batches: [batches[0] * math.nan, *batches[1:]], FloatingPointError, "NaN or infinity in what it reads"),
    (Shuffled, ValueError, "calibration: its first batch is another"),
]


@pytest.mark.parametrize(("make", "error", "words"), WRONG)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_calibrate_is_refused_before_anything_changes(make: Any, error: type[Exception], words: str,
                                                                   inplace: bool) -> None:
    model, batches, scores = scored("residual")
    with untouched(model), pytest.raises(error, match=words):
        fastscore.prune(model, scores, batches[0][:1], calibration=make(batches), inplace=inplace, channels=0.6)


@pytest.mark.parametrize(("make", "error", "words"), WRONG)
def test_they_are_called_what_the_user_called_them(make: Any, error: type[Exception], words: str) -> None:
    model, batches, scores = scored("residual")
    x, words = batches[0][:1], words.replace("calibration", "batches")
    result = fastscore.prune(model, scores, x, channels=0.6)
    with untouched(model), pytest.raises(error, match=words):
        fastscore.reconstruct(model, result, make(batches))
    for options in ({}, {"measured": False}):
        with untouched(model), pytest.raises(error, match=words):
            fastscore.curve(model, scores, make(batches), channels=[0.6], held_out=batches, example_inputs=x,
                            progress=False, **options)


def test_arguments_that_contradict_each_other() -> None:
    model, batches, scores = scored("residual")
    x = batches[0][:1]
    with pytest.raises(ValueError, match=r"calibration: .*compensate=False"):
        fastscore.prune(model, scores, x, channels=0.6, calibration=batches, compensate=False)
    result = fastscore.prune(model, scores, x, channels=0.6)
    with pytest.raises(ValueError, match="method: 'none' is none of"):
        fastscore.reconstruct(model, result, batches, method="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: "):
        fastscore.reconstruct(result.model, result, batches)
    with pytest.raises(TypeError, match=r"result: .*not its model alone"):
        fastscore.reconstruct(model, result.model, batches)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"repair: 'linear' .*calibration=batches"):
        fastscore.prune(model, scores, x, channels=0.6, repair="linear")
    with pytest.raises(ValueError, match="repair: 'none' is none of"):
        fastscore.prune(model, scores, x, channels=0.6, repair="none", calibration=batches)  # type: ignore[arg-type]


def test_of_a_model_pruned_twice_the_first_dense_one_is_refused() -> None:
    """Its layers are wide enough for what went in the second step; the result would be another network."""
    model, batches, scores = scored("residual")
    first = fastscore.prune(model, scores, batches[0][:1], channels=0.8)
    again = fastscore.score(first.model, batches, ablation="mean", progress=False)
    second = fastscore.prune(first.model, again, batches[0][:1], channels=0.8)
    with untouched(model), pytest.raises(ValueError, match=r"model: .*the last prune\(\)"):
        fastscore.reconstruct(model, second, batches)
    assert fastscore.reconstruct(first.model, second, batches, "mean").report.channels == second.report.channels


class Squeezing(nn.Module):
    """Drops the dimension of samples too, where there is one sample; without pooling, what a convolution reads."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.one, self.two, self.head, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        if self.pool:
            return self.head(self.two(self.one(x)).mean((2, 3), keepdim=True).squeeze())
        return self.head(self.two(self.one(x).squeeze()).mean((-1, -2)))


@pytest.mark.parametrize("pool", [False, True])
def test_a_sample_that_the_model_squeezes_away_is_named(pool: bool) -> None:
    """One is held out of each batch of four here. With as many channels as columns its rows would look alike.
    So few channels are left that every layer loses some."""
    model, x = Squeezing(pool), torch.randn(8, 3, 10, 10)
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model), pytest.raises(ValueError, match=r"reads \[.*without a dimension for samples.*squeeze"):
        fastscore.prune(model, scores, x[:2], channels=0.4, calibration=x.split(4))
