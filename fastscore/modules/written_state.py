"""What a model's own code writes to buffers and attributes when it runs: what a streaming model read last, a count of
calls, statistics of a first batch."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.copying import own_attributes

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_CONTAINERS = (dict, list, set, deque)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """After the block, the buffers and attributes of `model`, and the tensors, lists, dicts, sets and deques in them,
    hold what they did. Parameters are not looked at, nor statistics of BatchNorms, which evaluation does not write:
    whoever changes those means it. Nor are objects of other classes that attributes hold."""
    before = [(module, dict(module._buffers), own_attributes(module)) for module in model.modules()]
    held = dict[int, tuple[Any, Any]]()
    for _, buffers, own in before:
        _hold([buffer for name, buffer in buffers.items() if name not in _STATISTICS], held)
        _hold(own.values(), held)
    versions = {key: value._version for key, (value, _) in held.items()
                if isinstance(value, Tensor) and not value.is_inference()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, (value, was) in held.items():
                if not isinstance(value, Tensor):
                    _refill(value, was)
                elif key in versions and value._version != versions[key]:
                    value.copy_(was)
        for module, buffers, own in before:
            _refill(module._buffers, buffers)
            for name in own_attributes(module).keys() - own.keys():
                delattr(module, name)
            vars(module).update(own)


def _hold(values: Iterable[Any], held: dict[int, tuple[Any, Any]]) -> None:
    """Add what can be written to: id -> (it, a copy)."""
    for value in values:
        if id(value) in held:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            held[id(value)] = value, value.detach().clone()
        elif type(value) in _CONTAINERS:
            held[id(value)] = value, copy(value)
            _hold(value.values() if isinstance(value, dict) else value, held)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
