"""What a model's own code writes to buffers and attributes when it runs: what a streaming model read last, a count of
calls, statistics of a first batch."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.parts import version_of
from fastscore.modules.copying import own_attributes

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_Held = dict[int, tuple[Any, Any, int]]  # id of what can be written to -> it, a copy, how often it was written to


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """After the block, the buffers and attributes of `model`, and the tensors, tuples, lists, dicts, sets and deques in
    them, hold what they did. Parameters are not looked at, nor statistics of BatchNorms, which evaluation does not
    write, nor what lies in the memory of one: whoever changes those means it. Nor are objects of other classes that
    attributes hold, nor layers and parameters that are made in the block."""
    before = [(module, type(module), dict(module._buffers), own_attributes(module)) for module in model.modules()]
    meant = {storage_of(tensor) for module, _, buffers, _ in before for tensor in (
        *dict(module._parameters).values(), *_statistics(module, buffers)) if tensor is not None}
    held = _Held()
    for module, _, buffers, own in before:
        _hold([*buffers.values(), *own.values(), vars(module).get("_non_persistent_buffers_set")], held, meant)
    try:
        yield
    finally:
        with torch.no_grad():
            for value, was, version in held.values():
                if isinstance(value, Tensor):
                    _write_back(value, was, version)
                else:
                    _refill(value, was)
        for module, kind, buffers, own in before:
            if type(module) is not kind:  # nn.LazyLinear, which has become a Linear
                continue
            if isinstance(module, torch.jit.ScriptModule):  # whose buffers are no dict
                for name, buffer in buffers.items():
                    module._buffers[name] = buffer
            else:
                _refill(module._buffers, buffers)
            for name in own_attributes(module).keys() - own.keys():
                del vars(module)[name]
            made = {*module._parameters.keys(), *module._modules.keys()}
            vars(module).update({name: value for name, value in own.items() if name not in made})


def _statistics(module: nn.Module, buffers: dict[str, Tensor | None]) -> Iterator[Tensor | None]:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        yield from (buffer for name, buffer in buffers.items() if name in _STATISTICS)


def storage_of(x: Tensor) -> Any:
    """Tells the memory of a tensor from that of others; its own id where it is none that can be asked."""
    with suppress(Exception):  # of a sparse one, say
        return x.untyped_storage()._cdata
    return id(x)


def _hold(values: Iterable[Any], held: _Held, meant: set[Any]) -> None:
    """Add what can be written to, but for what lies in the memory that is `meant` to be."""
    for value in values:
        if isinstance(value, tuple):
            _hold(value, held, meant)
        elif id(value) in held:
            continue
        elif isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and storage_of(value) not in meant:
                held[id(value)] = value, value.detach().clone(), version_of(value)
        elif type(value) in _CONTAINERS:
            held[id(value)] = value, copy(value), 0
            _hold(value.values() if isinstance(value, dict) else value, held, meant)


def _write_back(x: Tensor, was: Tensor, version: int) -> None:
    same = x.shape == was.shape and version_of(x) == version
    with suppress(Exception):  # of a kind of tensor that is not compared; x.data is written to uncounted
        same = torch.equal(x, was)
    if same:
        return
    if x.shape != was.shape:
        x.data = was
        return
    if x.layout == torch.strided:  # places that share their memory cannot be written to at once
        once = [1 if step == 0 else size for size, step in zip(x.shape, x.stride(), strict=True)]
        x, was = (each[tuple(map(slice, once))] for each in (x, was))
    with torch.inference_mode(x.is_inference()):
        x.copy_(was)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
