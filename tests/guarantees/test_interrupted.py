"""Ctrl-C, as a real signal, at any call of the model: what came in is as it was, and no thread is left."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.pruning.budgets import latency

NETWORK = NETWORKS["plain"]
MODEL, BATCHES = NETWORK.model().float(), list(NETWORK.inputs(24).float().split(6))
SCORES = fastscore.score(MODEL, BATCHES, progress=False)
PRUNED = fastscore.prune(MODEL, SCORES, BATCHES[0], macs=0.6)
ACTS: dict[str, Callable[[Any], object]] = {
    "score": lambda forward: fastscore.score(MODEL, BATCHES, forward=forward, progress=False),
    "repair": lambda forward: fastscore.prune(MODEL, SCORES, BATCHES[0], macs=0.6, calibration=BATCHES,
                                              repair="asymmetric", forward=forward, progress=False),
    "reconstruct": lambda forward: fastscore.reconstruct(MODEL, PRUNED, BATCHES, "asymmetric", forward=forward,
                                                         progress=False),
    "distil": lambda forward: fastscore.distill(MODEL, PRUNED, BATCHES, steps=4, forward=forward, progress=False),
    "latency": lambda forward: fastscore.prune(MODEL, SCORES, BATCHES[0], latency=0.999, forward=forward,
                                               progress=False)}

LATE = {"score": 11, "repair": 30, "reconstruct": 30, "distil": 14, "latency": 100}  # a call in the midst of the work


@contextmanager
def same_values(model: nn.Module) -> Iterator[None]:
    """Weights and modes are afterwards what they were, whatever they were in between."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    yield
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]


@pytest.fixture(autouse=True)
def _python_hears_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(latency, "_SECONDS", 0.01)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("act", ACTS)
def test_models_are_as_they_were(act: str) -> None:
    calls = stop = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch)  # type: ignore[no-any-return]

    threads = threading.active_count()
    for stop in (2, 9, LATE[act]):
        calls = 0
        with untouched(MODEL), same_values(PRUNED.model), pytest.raises(KeyboardInterrupt):
            ACTS[act](forward)
        assert calls >= stop
        assert threading.active_count() == threads
