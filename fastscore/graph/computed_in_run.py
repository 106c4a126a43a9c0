"""Layers that compute their weight, seen in the model's own run: whether the weight that each computes alone is what it
multiplies by there, in every call, and whether its parameters are read there alone.

What fails is noted with the layer, which computes on in every copy, and keeps its channels: see
fastscore.modules.weights.computed_weights.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.kept import reasons
from fastscore.graph.noted_calls import reach
from fastscore.graph.trials.differences import close
from fastscore.graph.trials.recording import replaced, unwrapped
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import parameter_owners
from fastscore.modules.weights import computed_weights

_MORE = "computes its weight from more than its own parameters"
_FAR = 100.0  # times the values of the example: a weight that depends on the range of what is read


def note(model: nn.Module, run: Callable[[nn.Module, Batch], object], batches: Iterable[Batch]) -> None:
    """Note the layers of a user's model that compute their weight from more than their own parameters, or share those.

    Args:
        model: as the user has it; copies of it run.
        run(model, batch): calls a copy.
        batches: what the model is called on; it is run on others like them as well.
    """
    plain = dict(evaluation_copy(model).named_modules())
    names = {name for name, layer in plain.items() if computed_weights.was_computed(layer)}
    if not names:
        return
    copy = evaluation_copy(model, plain=False)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with _Watch(copy, {name: plain[name] for name in names}) as watch:
        for batch in [other for each in {id(batch): batch for batch in batches}.values() for other in _and_others(each)]:
            with suppress(Exception):  # what the model cannot take, the tracer says
                run(copy, batch)
    users = dict(model.named_modules())
    for name, reason in {**watch.reasons, **_shared(copy, names)}.items():
        computed_weights.compute_on(users[name], reason)


def less(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """The graph of an evaluation copy without what layers make or read that go on computing their weight."""
    layers = dict(model.named_modules())
    kept = {group.name: why for group in graph.groups if (why := reasons.computing(layers, group.members))}
    rest = {kind: tuple(group for group in getattr(graph, kind) if not reasons.computing(layers, group.members))
            for kind in ("head_dims", "experts")}
    return replace(graph.less(kept) if kept else graph, head_dims=rest["head_dims"], experts=rest["experts"])


def _and_others(batch: Batch) -> list[Batch]:
    tensor = first_tensor(batch)
    others = [batch, map_tensors(lambda x: x * _FAR if x.is_floating_point() else x, batch)]
    return [*others, batch_of(batch, len(tensor) + 2)] if tensor is not None and tensor.dim() else others


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What a layer computes its weight from."""
    return {name: parameter for name, parameter in layer._parameters.items()
            if name != "bias" and parameter is not None}


def _shared(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    owners = parameter_owners(model)
    return {name: f"{name} computes its weight from a {key} that it shares with another layer" for name in names
            for key, parameter in _own(model.get_submodule(name)).items() if owners[id(parameter)] > 1}


class _Watch(TorchFunctionMode):
    """In the block, what runs of `model` show of layers that compute their weight. plain: layer -> what it is with the
    weight that it computed alone."""

    def __init__(self, model: nn.Module, plain: dict[str, nn.Module]) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self._plain, self._layers = plain, {name: model.get_submodule(name) for name in plain}
        self._owner = {id(parameter): (name, key) for name, layer in self._layers.items()
                       for key, parameter in _own(layer).items()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._inside: list[str] = []
        self._read: dict[str, set[int]] = {}  # layer -> parameters its weight came of, in the first call
        self._replaced = replaced(model, {name: self._forward_of(name) for name in plain})

    def __enter__(self) -> "_Watch":
        self._replaced.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._replaced.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for tensor in tensors_of([args, kwargs]) if next(tensors_of([output]), None) is not None else ():
            name, key = self._owner.get(id(tensor), ("", ""))
            if name and self._inside[-1:] != [name]:
                self.reasons[name] = f"{name} computes its weight from {name}.{key}, which other code reads as well"
        if self._inside and (weight := computed_weights.multiplied_by(func, args, kwargs)) is not None:
            self._see_source(self._inside[-1], weight)
        return output

    def _forward_of(self, name: str) -> Callable[..., Any]:
        layer, plain = self._layers[name], self._plain[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                expected = type(plain).forward(plain, *args, **kwargs)
            self._inside.append(name)
            try:
                output = type(layer).forward(layer, *args, **kwargs)
            finally:
                self._inside.pop()
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if not _same(output, expected):
                    self.reasons.setdefault(name, f"{name} {_MORE}: it was not the same in every call")
            return output

        return forward

    def _see_source(self, name: str, weight: Tensor) -> None:
        """Note a weight that came of other parameters than the layer's own, or of others than in the first call."""
        if not torch.is_grad_enabled():
            return
        nodes = set[Any]()
        reach(weight.grad_fn, nodes)
        read = {id(node.variable) for node in nodes if hasattr(node, "variable")} if nodes else {id(weight)}
        others = read - {id(parameter) for parameter in _own(self._layers[name]).values()}
        if others:
            what = self._names.get(min(others), "what the model's code hands it")
            self.reasons.setdefault(name, f"{name} {_MORE} ({what})")
        elif read != self._read.setdefault(name, read):
            self.reasons.setdefault(name, f"{name} computes its weight from other parameters in other calls")


def _same(output: object, expected: object) -> bool:
    if not isinstance(output, Tensor) or not isinstance(expected, Tensor):
        return False
    output, expected = unwrapped(output), unwrapped(expected)
    return output.shape == expected.shape and bool(close(output, expected).all())
