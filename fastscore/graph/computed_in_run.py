"""Layers that compute their weight, seen in the model's own run: whether the weight that each computes alone is what it
multiplies by there, in every call, and whether its parameters are read there alone.

What fails is noted with the layer, which computes on in every copy, and keeps its channels: see
fastscore.modules.weights.computed_weights.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches.calls import Forward
from fastscore.batches.devices import usable
from fastscore.batches.parts import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.autograd_nodes import reach
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.kept import reasons
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.replaced_layers import read_by, replaced, unwrapped
from fastscore.graph.trials.running import error_of
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import with_input
from fastscore.modules.inspection import device_of, parameter_owners, runs_own_code
from fastscore.modules.weights import computed_weights, reparametrized
from fastscore.modules.weights.own_layers import own_layer
from fastscore.modules.wrappers import without_checkpoints
from fastscore.rng import fork_rng

_MORE = "computes its weight from more than its own parameters"
_FAR = 100.0  # times what a layer reads: its weight may depend on the range of that


def note(model: nn.Module, forward: Forward, example: Batch, samples: Batch | None) -> None:
    """Note the layers of a user's model that compute their weight from more than their own parameters, or share those.

    Copies of it run on the example, on `samples`, if there are some, and on others like them.
    """
    layers = dict(model.named_modules())
    held = [name for name, layer in layers.items() if reparametrized.values(layer)]
    for name, reason in _shared(model, held).items():
        computed_weights.compute_on(layers[name], reason)
    unknown = {name for name in held if reparametrized.of_unknown_code(layers[name])}
    users: dict[str, nn.Module] = {name: layer for name, layer in layers.items()
                                   if name in unknown or runs_own_code(layer) or own_layer(layer) is not None}
    if not users:
        return
    plain: dict[str, nn.Module] = dict(evaluation_copy(model).named_modules())
    computed = {name for name in users if name in plain and (computed_weights.was_computed(plain[name])
                                                             or name in unknown)}
    names = computed.union(name for name, layer in users.items() if type(plain.get(name)) is type(layer)
                           and computed_weights.multiplies_plainly(layer))
    if not names:
        return
    copy = evaluation_copy(model, plain=False)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    runs = [*_and_another(example), *([] if samples is None else _and_another(map_tensors(usable, samples)))]
    with torch.enable_grad(), without_checkpoints(), fork_rng(device_of(model)), \
            _Watch(copy, {name: plain[name] for name in names}, computed) as watch:
        for batch in runs:
            with suppress(Exception):  # what the model cannot take, the tracer says
                forward(copy, batch)
    for name, reason in {**watch.reasons, **_shared(copy, computed)}.items():
        computed_weights.compute_on(users[name], reason)
    with without_checkpoints(), fork_rng(device_of(model)):
        _note_read(model, {name: users[name] for name in computed if own_layer(users[name]) is not None},
                   forward, example)


def _note_read(model: nn.Module, layers: dict[str, nn.Module], forward: Forward, example: Batch) -> None:
    """Note layers of a class of their own where the model does not run with PyTorch's in their places: its code reads
    more of them."""
    def fails(plain: bool) -> bool:
        batch = map_tensors(lambda tensor: tensor.detach().clone(), example)
        return error_of(lambda: forward(evaluation_copy(model, plain=plain), batch)) is not None

    if layers and fails(plain=True) and not fails(plain=False):
        for name, layer in layers.items():
            computed_weights.compute_on(layer, f"{name} is of a class of its own ({type(layer).__name__}), of which "
                                               f"the model's code reads what a {_plain_name(layer)} has not")


def less(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """The graph of an evaluation copy without what layers make or read that go on computing their weight."""
    layers = dict(model.named_modules())
    kept = {group.name: why for group in graph.groups if (why := reasons.computing(layers, group.members))}
    rest = {kind: tuple(group for group in getattr(graph, kind) if not reasons.computing(layers, group.members))
            for kind in ("head_dims", "experts")}
    return replace(graph.less(kept) if kept else graph, head_dims=rest["head_dims"], experts=rest["experts"])


def _and_another(batch: Batch) -> list[Batch]:
    tensor = first_tensor(batch)
    return [batch, batch_of(batch, len(tensor) + 2)] if tensor is not None and tensor.dim() else [batch]


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What a layer computes its weight from."""
    if made := reparametrized.values(layer):
        return {key: layer.get_parameter(key) for name in made for key in reparametrized.sources(layer, name)}
    return {name: parameter for name, parameter in layer._parameters.items()
            if name != "bias" and parameter is not None}


def _plain_name(layer: nn.Module) -> str:
    own = own_layer(layer)
    return f"nn.{nn.Linear.__name__ if own is None else own.kind.__name__}"


def _shared(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    owners = parameter_owners(model)
    layers = {name: model.get_submodule(name) for name in names}
    return {name: f"{name} shares its {key} with another layer" if own_layer(layer) is not None else
            f"{name} computes its weight from a {key} that it shares with another layer"
            for name, layer in layers.items() for key, parameter in _own(layer).items() if owners[id(parameter)] > 1}


class _Watch(TorchFunctionMode):
    """In the block, what runs of `model` show of layers that compute their weight. plain: layer -> what it is with the
    weight that it computed alone; computed: those of them that computed another one than their own."""

    def __init__(self, model: nn.Module, plain: dict[str, nn.Module], computed: Collection[str]) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self._plain, self._layers = plain, {name: model.get_submodule(name) for name in plain}
        self._computed = computed
        self._own_class = {name: f"nn.{own.kind.__name__}" for name, layer in self._layers.items()
                           if (own := own_layer(layer)) is not None}
        self._owner = {id(parameter): (name, key) for name in computed
                       for key, parameter in _own(self._layers[name]).items()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._inside: list[str] = []
        self._far = set[str]()  # layers that have been tried on large values
        self._read: dict[str, set[int]] = {}  # layer -> parameters its weight came of, in the first call
        self._replaced = replaced(model, {name: self._forward_of(name) for name in plain})

    def __enter__(self) -> "_Watch":
        self._replaced.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._replaced.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for tensor in tensors_of([args, kwargs]) if next(tensors_of([output]), None) is not None else ():
            name, key = self._owner.get(id(tensor), ("", ""))
            if name and self._inside[-1:] != [name]:
                what = "reads" if name in self._own_class else "computes its weight from"
                self.reasons[name] = f"{name} {what} {name}.{key}, which other code reads as well"
        if self._inside and (weight := computed_weights.multiplied_by(func, args, kwargs)) is not None:
            self._see_source(self._inside[-1], weight)
        return output

    def _forward_of(self, name: str) -> Callable[..., Any]:
        layer, plain = self._layers[name], self._plain[name]
        by_code = not nn.utils.parametrize.is_parametrized(layer)
        plainly = partial(_made, computed_weights.plain_forward if by_code else type(plain).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = read_by(args, kwargs)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                expected = plainly(plain, args, kwargs)
                if x is not None and name not in self._far:
                    self._far.add(name)
                    far = with_input(args, kwargs, x * _FAR)
                    with suppress(Exception):  # of code that refuses such values
                        self._compare(name, type(layer).forward(layer, *far[0], **far[1]), plainly(plain, *far))
            self._inside.append(name)
            try:
                output = type(layer).forward(layer, *args, **kwargs)
            finally:
                self._inside.pop()
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._compare(name, output, expected)
            return output

        return forward

    def _compare(self, name: str, output: object, expected: object) -> None:
        if not _same(output, expected) and (expected is not None or name in self._computed):
            self._note_other(name)

    def _see_source(self, name: str, weight: Tensor) -> None:
        """Note a weight that came of other parameters than the layer's own, or of others than in the first call."""
        if not torch.is_grad_enabled():
            return
        nodes = set[Any]()
        reach(weight.grad_fn, nodes)
        read = {id(node.variable) for node in nodes if hasattr(node, "variable")} if nodes else {id(weight)}
        others = read - {id(parameter) for parameter in _own(self._layers[name]).values()}
        if others:
            what = next((key for at, key in self._names.items() if at in others), "what the model's code hands it")
            self.reasons[name] = f"{name} {_MORE} ({what})"
        elif read != self._read.setdefault(name, read):
            self._note_other(name)

    def _note_other(self, name: str) -> None:
        self.reasons.setdefault(name, f"{name} does not make what a {self._own_class[name]} would in every call"
                                if name in self._own_class else f"{name} {_MORE}: it was not the same in every call")


def _made(forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return forward(layer, *args, **kwargs)
    except Exception:  # of what the layer's own code takes, as of another dtype
        return None


def _same(output: object, expected: object) -> bool:
    if not isinstance(output, Tensor) or not isinstance(expected, Tensor):
        return False
    return all_close(unwrapped(output), unwrapped(expected))
