"""Graphs that have been traced, by model: who scores, masks and prunes a model traces it once.

A graph is handed out again only while the model is the same object, holds the same modules, parameters and settings,
and is called in the same way on inputs of the same shape. It is forgotten with the model.
"""

import inspect
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch, map_tensors, tensors_of
from fastscore.graph.groups import ChannelGraph
from fastscore.modules.copying import own_attributes
from fastscore.modules.hooks import OwnHook

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_known: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, weakref.ref[Any], ChannelGraph, Any]]" = \
    weakref.WeakKeyDictionary()


def get(model: nn.Module, example_inputs: Batch, forward: Forward, samples: Batch = None) -> ChannelGraph | None:
    """The graph that was put here; None where one of what it was made by is another.

    Of the model, its modules, parameters (not their values), buffers (those of flags alone), settings and hooks are
    compared; the inputs by shapes and dtypes, whatever the number of samples; `forward` by identity. samples: a batch
    of several; where the graph was made with one sample, of as many rows as this.
    """
    fingerprint, called, graph, rows = _known.get(model, (None, None, None, None))
    if called is None or called() is not forward or fingerprint != _fingerprint(model, example_inputs):
        return None
    return None if graph is not None and graph.samples.one and rows != _rows(samples, example_inputs) else graph


def put(model: nn.Module, example_inputs: Batch, forward: Forward, graph: ChannelGraph, samples: Batch = None) -> None:
    """Keep the graph for as long as the model lives; neither it nor `forward` is kept alive by this."""
    with suppress(TypeError):  # what cannot be referred to weakly is traced anew each time
        _known[model] = _fingerprint(model, example_inputs), weakref.ref(forward), graph, _rows(samples, example_inputs)


def forget(model: nn.Module) -> None:
    """Have the model traced anew when that is next asked for."""
    _known.pop(model, None)


def _rows(samples: Batch, example_inputs: Batch) -> list[int]:
    return [x.shape[:1].numel() for x in tensors_of(example_inputs if samples is None else samples)]


def _fingerprint(model: nn.Module, example_inputs: Batch) -> Any:
    """Equal for a model, and a batch of any number of samples, between which the graph cannot have changed."""
    shapes: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append((tensor.shape[1:], tensor.dtype))
        return tensor

    map_tensors(note, example_inputs)
    shapes.append(sorted(example_inputs) if isinstance(example_inputs, Mapping) else type(example_inputs))
    return shapes, [(name, id(module), type(module), *_settings(module)) for name, module in model.named_modules()]


def _settings(module: nn.Module) -> tuple[Any, ...]:
    held = [(name, id(tensor), None if tensor is None else _shape_or_flag(tensor))
            for tensors in (module._parameters, module._buffers) for name, tensor in tensors.items()]
    hooks = [id(hook) for hooks in (module._forward_pre_hooks, module._forward_hooks) for hook in hooks.values()
             if not isinstance(hook, OwnHook)]
    # Whatever else a forward may read: settings by value, lists of them too, all else by what object it is.
    own = [(name, _value(value)) for name, value in own_attributes(module).items()]
    return held, hooks, own, id(inspect.getattr_static(type(module), "forward"))


def _shape_or_flag(tensor: Tensor) -> Any:
    """The shape; of a single flag, as FakeQuantize has them, what it says."""
    flag = tensor.shape == (1,) and not tensor.is_floating_point() and not tensor.is_complex() and not tensor.is_meta
    return (tensor.shape, int(tensor)) if flag else tensor.shape


def _value(value: object) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        return [_value(each) for each in value]
    return id(value)
