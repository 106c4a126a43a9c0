"""Calibration samples that are all of a kind, as the first of a sorted data set are."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import fastscore


def _run(images: Tensor, model: nn.Module) -> None:
    batches = images.split(16)
    scores = fastscore.score(model, batches, progress=False)
    fastscore.prune(model, scores, images[:2], macs=0.8, calibration=batches, repair="linear", progress=False)


def test_samples_of_one_class_are_warned_of_and_those_of_all_are_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    images = torch.randn(600, 3)
    with torch.no_grad():
        classes = model(images).argmax(1)
    least = int(classes.bincount(minlength=3).argmax())
    with pytest.warns(UserWarning, match=r"^calibration: the dense network decides alike on 100\.0% of the 2\d samples "
                                         "that judge repairs; .*sorted data set.*: give samples of every kind"):
        _run(images[classes == least][:96], model)
    for fine in (images[:96], images[classes == least][:48]):  # too few to tell
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _run(fine, model)


def test_pixels_that_are_alike_are_no_samples_of_a_kind() -> None:
    """As those of a background are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    nn.init.constant_(model[2].bias, 5.0)
    with torch.no_grad():
        model[2].bias[1] = -5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(torch.randn(96, 1, 6, 6), model)
