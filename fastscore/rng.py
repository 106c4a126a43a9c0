"""Random-number states that come back as they were."""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_forks: dict[torch.device, tuple[int, AbstractContextManager[None]]] = {}  # blocks inside; the fork of the first
_forks_lock = threading.Lock()
_started: dict[torch.device, torch.Tensor] = {}  # the states that start_over left


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Random-number states of torch, for the CPU and for `device`, of Python and of numpy come back on leaving as they
    were on entering.

    The states are the process's: where blocks of several threads overlap, the last to end brings back what the first
    found.
    """
    with _forks_lock:
        inside, first = _forks.get(device, (0, _fork(device)))
        if not inside:
            first.__enter__()
        _forks[device] = inside + 1, first
    try:
        with _fork(device):
            yield
    finally:
        with _forks_lock:
            inside, first = _forks.pop(device)
            if inside > 1:
                _forks[device] = inside - 1, first
            else:
                first.__exit__(None, None, None)


def seed(number: int) -> None:
    """Seed all generators that fork_rng brings back."""
    torch.manual_seed(number)
    random.seed(number)
    if numpy := _numpy():
        numpy.seed(number % 2**32)


def start_over(device: torch.device) -> None:
    """Seed the generators of the CPU and of `device` with 0, so that what is drawn is drawn again.

    torch.manual_seed() seeds those of all devices, and notes the call stack for each kind that is not in use yet.
    """
    if device.type in ("cpu", "meta"):
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)
    _started.update({kind: _state(kind) for kind in _kinds(device)})


def has_drawn(device: torch.device) -> bool:
    """Whether anything was drawn since start_over(device)."""
    return any(not torch.equal(_state(kind), _started[kind]) for kind in _kinds(device))


def states(device: torch.device) -> Iterator[torch.Tensor]:
    """Of the generators of the CPU and of `device`."""
    return map(_state, _kinds(device))


def _kinds(device: torch.device) -> list[torch.device]:
    return [torch.device("cpu")] + ([] if device.type in ("cpu", "meta") else [device])


def _state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


@contextmanager
def _fork(device: torch.device) -> Iterator[None]:
    numpy = _numpy()
    state, of_numpy = random.getstate(), numpy and numpy.get_state(legacy=False)
    others = {} if device.type in ("cpu", "meta") else {"device_type": device.type}
    try:
        with torch.random.fork_rng(devices=[device] if others else [], **others):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.set_state(of_numpy)


def _numpy() -> Any:
    """numpy.random, where a model's code can have imported it."""
    return sys.modules.get("numpy.random")
