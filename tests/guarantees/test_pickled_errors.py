"""Errors come out of other processes: of a DataLoader's workers, of multiprocessing."""

import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastscore

# of those whose constructors take something else than what they say
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "OutOfReachError": ("macs", 0.1, 0.35), "ResizedError": ("fc.weight (10, 512) for (1000, 512)", 10),
    "FailsNarrowerError": (["conv"], {"conv": torch.tensor([1])}, lambda removed: True, "does not run")}


def errors() -> Iterator[type[BaseException]]:
    """All that the library defines, but for what is in files that need what is not installed."""
    for info in pkgutil.walk_packages(fastscore.__path__, "fastscore."):
        if "._C" in info.name or ".integrations." in info.name or info.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == info.name:
                yield value


@pytest.mark.parametrize("kind", list(errors()), ids=lambda kind: kind.__name__)
def test_an_error_comes_back_from_a_pickle(kind: type[BaseException]) -> None:
    error = kind(*EXAMPLES.get(kind.__name__, ("layer: what is wrong; the way out",)))
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert isinstance(back, kind) or type(back) in kind.__mro__[1:-2]
    assert vars(back) == (vars(error) if type(back) is kind else {})


def test_what_prune_raises_comes_back() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(4, 4)
    scores = fastscore.score(model, [x], progress=False)
    with pytest.raises(ValueError, match=r"macs: 0.01 cannot be reached") as raised:
        fastscore.prune(model, scores, x, macs=0.01, progress=False)
    raised.value.args = (f"{raised.value}. first keeps 6 channels",)  # as what catches it adds
    back = pickle.loads(pickle.dumps(raised.value))
    assert str(back).endswith("layers. first keeps 6 channels")
    assert (str(back), back.least) == (str(raised.value), raised.value.least)
