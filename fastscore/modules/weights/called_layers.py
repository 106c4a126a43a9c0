"""Layers that a module's code runs without a call: by a function of their parameters, `F.conv2d(x, self.c.weight,
self.c.bias)`, or as `self.c.forward(x)`, which hooks do not see.

Where a model ran, such uses are noted, if they compute what the layer would; in evaluation copies, and in a user's
model as long as it is tapped or masked, the layer is called there.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import takewhile
from types import FrameType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fastscore.modules import frames
from fastscore.modules.handles import Handle
from fastscore.modules.inspection import hooked
from fastscore.modules.weights import layer_functions

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
           nn.PReLU, nn.Embedding, nn.RNNBase)  # whose forward may run without a call
_MARK, _UNREAD = "_calls_layers", "_bias_is_not_read"


@dataclass(frozen=True)
class Uses:
    """Of a module's code: the layers below it that it runs without a call, by their names there; and those of them
    that have no bias, and would add none if they had."""

    layers: frozenset[str]
    without_bias: frozenset[str]


_noted: "weakref.WeakKeyDictionary[nn.Module, Uses]" = weakref.WeakKeyDictionary()  # of users' models


class Noting(TorchFunctionMode):
    """In the block, what a run of a model, a copy, shows of such uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            if (weight := module._parameters.get("weight")) is not None:
                self._owners.setdefault(id(weight), []).append(module)
        self._watched = [module for module in model.modules() if isinstance(module, _LAYERS)
                         and "forward" not in vars(module)]
        self._used: dict[str, set[str]] = {}  # module -> layers
        self._without_bias = set[str]()
        self._past = set[str]()  # layers whose forward runs, and cannot be called instead
        self._otherwise = set[str]()  # layers whose weight is used for something else

    def __enter__(self) -> "Noting":
        for layer in self._watched:
            vars(layer)["forward"] = self._forward_of(layer)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for layer in self._watched:
            del vars(layer)["forward"]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in layer_functions.FUNCTIONS:
            given, stack = layer_functions.bound(func, args, kwargs), list(frames.outwards())
            owners = self._owners.get(id(given.get("weight")), [])
            own_forward = any(frames.owner(frame) is layer for frame in stack for layer in owners)
            if owners and not own_forward:
                name, around = self._names[owners[0]], self._around(owners[0], stack)
                if len(owners) > 1 or around is None or not layer_functions.computes_the_same(owners[0], func, given):
                    self._otherwise.add(name)
                else:
                    self._used.setdefault(around, set()).add(name)
                    self._without_bias |= {name} if owners[0]._parameters.get("bias") is None else set()
        return func(*args, **kwargs)

    def _around(self, layer: nn.Module, stack: list[FrameType]) -> str | None:
        """The innermost module that is called, where it holds the layer."""
        caller = frames.innermost(stack)
        around = None if caller is None else self._names.get(caller)
        return around if around is not None and f"{self._names[layer]}.".startswith(f"{around}." if around else "") \
            else None

    def _forward_of(self, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stack = list(frames.outwards())
            if frames.innermost(stack) is not layer:
                around = None if hooked(layer) else self._around(layer, stack)
                if around is None:
                    self._past.add(self._names[layer])
                else:
                    self._used.setdefault(around, set()).add(self._names[layer])
            return type(layer).forward(layer, *args, **kwargs)

        return forward

    def remember(self, model: nn.Module) -> dict[str, str]:
        """Remember of the modules of `model`, which the one that ran is a copy of, what was noted.

        Returns layers that are run without a call, which cannot be called instead -> why they are kept."""
        modules = dict(model.named_modules())
        for around, names in self._used.items():
            whole, begin = names - self._otherwise - self._past, len(around) + 1 if around else 0
            if around in modules and whole:
                _noted[modules[around]] = Uses(frozenset(name[begin:] for name in whole),
                                               frozenset(name[begin:] for name in whole & self._without_bias))
        return {name: f"the model's code runs {name} by {name}.forward(x), which its hooks do not see: write {name}(x)"
                for name in self._past if name in modules}


class _Calls(TorchFunctionMode):
    """In the block, those layers are called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module, names = module, vars(module)[_MARK].layers
        self._layers = [module.get_submodule(name) for name in names]
        self._of_weight = {id(layer._parameters.get("weight")): layer for layer in self._layers}

    def __enter__(self) -> "_Calls":
        for layer in self._layers:
            forward = vars(layer).get("forward")
            if not isinstance(forward, _CallOrRun):
                forward = vars(layer)["forward"] = _CallOrRun(layer, forward)
            forward.users += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for layer in self._layers:
            forward: _CallOrRun = vars(layer).pop("forward")
            forward.users -= 1
            if forward.users or forward.before is not None:
                vars(layer)["forward"] = forward if forward.users else forward.before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in layer_functions.FUNCTIONS:
            given = layer_functions.bound(func, args, kwargs)
            layer = self._of_weight.get(id(given.get("weight")))
            if layer is not None and not given.get("training") and layer_functions.has_settings_of(layer, given) and \
                    not self._runs_itself(layer):
                return layer(given["input"])
        return func(*args, **kwargs)

    def _runs_itself(self, layer: nn.Module) -> bool:
        """Whether its own forward, or hooks of it, call a function."""
        inside = takewhile(lambda frame: frames.called(frame) is not self._module, frames.outwards())
        return any(frames.owner(frame) is layer or frames.called(frame) is layer for frame in inside)


class _CallOrRun:
    """The forward of a layer, which calls it where it is not called. users: the runs that it is there for, of which
    several may halt and go on by turns; before: what was there."""

    def __init__(self, layer: nn.Module, before: Callable[..., Any] | None) -> None:
        self._layer, self.before, self.users = layer, before, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if frames.innermost(frames.outwards()) is not self._layer:
            return self._layer(*args, **kwargs)
        return type(self._layer).forward(self._layer, *args, **kwargs) if self.before is None else \
            self.before(*args, **kwargs)


class LayersCalled(Handle):
    """A module whose code calls layers, until `remove`."""

    def __init__(self, module: nn.Module, uses: Uses) -> None:
        self._module = module
        vars(module)[_MARK] = uses
        for name in uses.without_bias:
            vars(module.get_submodule(name))[_UNREAD] = True
        module.__class__ = _calling(type(module))

    def remove(self) -> None:
        put_back(self._module)

    def make_permanent(self) -> None:
        """There is nothing to forget."""


def replace(model: nn.Module, noted: nn.Module) -> Iterator[Handle]:
    """Have modules whose code was noted call their layers.

    Args:
        model: changed in place.
        noted: itself, or the model that it is a copy of.

    Yields:
        For each module, a handle that undoes it.
    """
    for name, module in list(noted.named_modules()) if _noted else ():
        if module in _noted and _MARK not in vars(own := model.get_submodule(name)):
            yield LayersCalled(own, _noted[module])


def remember_in(model: nn.Module, copy: nn.Module) -> None:
    """Remember of the modules of another model, which is like `model`, what was noted of those."""
    for name, module in model.named_modules() if _noted else ():
        if module in _noted:
            _noted[copy.get_submodule(name)] = _noted[module]


def put_back(module: nn.Module) -> None:
    """Take off a module that which has its code call layers, in place; nothing of any other."""
    uses = vars(module).pop(_MARK, None)
    if uses is None:
        return
    module.__class__ = vars(type(module))["_before"]
    for name in uses.without_bias:
        vars(module.get_submodule(name)).pop(_UNREAD, None)


def reads_no_bias(layer: nn.Module) -> bool:
    """Whether a layer of such a copy has no bias, and the model's code would add none."""
    return _UNREAD in vars(layer)


_CALLING: dict[Any, type] = {}  # a class -> it, whose forward calls layers


def _calling(cls: Any) -> type:
    if cls not in _CALLING:
        own: Callable[..., Any] = cls.forward

        @wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _Calls(self):
                return own(self, *args, **kwargs)

        _CALLING[cls] = type(cls.__name__, (cls,), {"_before": cls, "forward": forward, "__module__": cls.__module__,
                                                    "__qualname__": cls.__qualname__})
    return _CALLING[cls]
