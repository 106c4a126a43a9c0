"""Layers that a module's code runs without a call: by a function of their parameters, `F.conv2d(x, self.c.weight,
self.c.bias)`, or as `self.c.forward(x)`, which hooks do not see.

Where a model ran, such uses are noted (see fastscore.modules.weights.noted_uses); in evaluation copies, and in a user's
model as long as it is tapped or masked, the layer is called there.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from fastscore.modules import frames
from fastscore.modules.copying import counterparts
from fastscore.modules.forwards import Forward, ForwardWithin, InThePlaceOfForwards
from fastscore.modules.handles import Handle
from fastscore.modules.hooks import has_users_hooks
from fastscore.modules.inspection import hooked
from fastscore.modules.weights import layer_functions


@dataclass(frozen=True)
class Uses:
    """Of a module's code: the layers below it that it runs without a call, by their names there; and those of them
    that have no bias, and would add none if they had."""

    layers: frozenset[str]
    without_bias: frozenset[str]


NOTED: "weakref.WeakKeyDictionary[nn.Module, Uses]" = weakref.WeakKeyDictionary()  # of users' models


class _Calls(InThePlaceOfForwards):
    """In the block, those layers are called."""

    def __init__(self, module: nn.Module, own: "_CallsLayers") -> None:
        super().__init__()
        self._module, self._own = module, own
        self._layers = {name: module.get_submodule(name) for name in own.uses.layers}
        self._of_weight = {id(weight): name for name, layer in self._layers.items()
                           if (weight := layer._parameters.get("weight")) is not None}

    def stand_ins(self) -> Iterator[Forward]:
        return map(_CallOrRun.put, self._layers.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in layer_functions.FUNCTIONS:
            given = layer_functions.bound(func, args, kwargs)
            name = self._of_weight.get(id(given.get("weight")))
            if name is not None and not self._runs_itself(layer := self._layers[name]):
                if not given.get("training") and layer_functions.computes_the_same(layer, func, given):
                    return layer(given["input"])
                if self._own.permanent or hooked(layer):  # else nobody would see a call
                    raise RuntimeError(
                        f"{name}: the code of {type(self._module).__name__} runs it by {func.__name__}(), which does "
                        "on this batch what the layer would not (another stride, padding, dilation or mode, say), and "
                        f"did what it would on the first one: use batches of one kind, or write {name}(x) there")
        return func(*args, **kwargs)

    def _runs_itself(self, layer: nn.Module) -> bool:
        """Whether its own forward, or hooks of it, call a function."""
        inside = takewhile(lambda frame: frames.called(frame) is not self._module, frames.outwards())
        return any(frames.owner(frame) is layer or frames.called(frame) is layer for frame in inside)


class _CallOrRun(Forward):
    """Of a layer: calls it where it is not called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.users and frames.innermost(frames.outwards()) is not self.module:
            return self.module(*args, **kwargs)
        return self.run(self.module, *args, **kwargs)


class _CallsLayers(ForwardWithin):
    """Of a module whose code calls layers. uses: of it, and names below it."""

    uses: Uses

    def block(self, module: nn.Module) -> _Calls:
        return _Calls(module, self)


def replace(model: nn.Module, noted: nn.Module) -> Iterator[Handle]:
    """Have modules whose code was noted call their layers, a handle for each.

    noted: the model itself, or the one that it is a copy of. Raises ValueError where the user has set a hook on such a
    layer since.
    """
    for module in noted.modules() if NOTED and noted is model else ():
        for name in NOTED[module].layers if module in NOTED else ():
            if has_users_hooks(module.get_submodule(name)):
                raise ValueError(f"{name}: a hook has been set on it, which the code of {type(module).__name__} does "
                                 f"not run, as it does not call it: remove the hook, or write {name}(x) there")
    for module, own in counterparts(NOTED, noted, model):
        calls = _CallsLayers.put(own)
        calls.uses = NOTED[module]
        yield calls


def remember_in(model: nn.Module, copy: nn.Module) -> None:
    """Remember of the modules of another model, which is like `model`, what was noted of those."""
    for module, own in counterparts(NOTED, model, copy):
        NOTED[own] = NOTED[module]


def without_bias(model: nn.Module) -> set[str]:
    """The layers of such a copy that have no bias, where the model's code would add none."""
    return {f"{name}.{layer}".lstrip(".") for name, module in model.named_modules()
            if isinstance(own := vars(module).get("forward"), _CallsLayers) for layer in own.uses.without_bias}
