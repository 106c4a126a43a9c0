"""Layers that a module's code runs without a call: by a function of their parameters, `F.conv2d(x, self.c.weight,
self.c.bias)`, or as `self.c.forward(x)`, which hooks do not see.

Where a model ran, such uses are noted, if they compute what the layer would; in evaluation copies, and in a user's
model as long as it is tapped or masked, the layer is called there.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import takewhile
from types import FrameType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.modules.inspection import hooked

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# function -> (the layers that it runs, the names of its arguments); that of a LayerNorm is given its width, which stays
_FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ("input", "weight", "bias")),
    F.conv1d: (nn.Conv1d, _CONV), F.conv2d: (nn.Conv2d, _CONV), F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED), F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
    F.batch_norm: (nn.modules.batchnorm._BatchNorm, _BATCH),
    F.group_norm: (nn.GroupNorm, ("input", "num_groups", "weight", "bias", "eps")),
    F.prelu: (nn.PReLU, ("input", "weight")),
    F.embedding: (nn.Embedding, ("input", "weight", "padding_idx", "max_norm")),
}
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
           nn.PReLU, nn.Embedding, nn.RNNBase)  # whose forward may run without a call
# of arguments that are not given, where they do something
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "training": False, "eps": 1e-5}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_NO_MATTER = ("input", "momentum", "padding_idx")  # of evaluation mode
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
        if func in _FUNCTIONS:
            given, frames = _bound(func, args, kwargs), list(_frames())
            owners = self._owners.get(id(given.get("weight")), [])
            if owners and not any(_owner(frame) is layer for frame in frames for layer in owners):  # its own forward
                name, around = self._names[owners[0]], self._around(owners[0], frames)
                if len(owners) > 1 or around is None or not _does_the_same(owners[0], func, given):
                    self._otherwise.add(name)
                else:
                    self._used.setdefault(around, set()).add(name)
                    self._without_bias |= {name} if owners[0]._parameters.get("bias") is None else set()
        return func(*args, **kwargs)

    def _around(self, layer: nn.Module, frames: list[FrameType]) -> str | None:
        """The innermost module that is called, where it holds the layer."""
        caller = next(filter(None, map(_called, frames)), None)
        around = None if caller is None else self._names.get(caller)
        return around if around is not None and f"{self._names[layer]}.".startswith(f"{around}." if around else "") \
            else None

    def _forward_of(self, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            frames = list(_frames())
            if not _runs(layer, frames):
                around = None if hooked(layer) else self._around(layer, frames)
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
        if func in _FUNCTIONS:
            given = _bound(func, args, kwargs)
            layer = self._of_weight.get(id(given.get("weight")))
            if layer is not None and not given.get("training") and _has_settings(layer, given) and \
                    not self._runs_itself(layer):
                return layer(given["input"])
        return func(*args, **kwargs)


    def _runs_itself(self, layer: nn.Module) -> bool:
        """Whether its own forward, or hooks of it, call a function."""
        inside = takewhile(lambda frame: _called(frame) is not self._module, _frames())
        return any(_owner(frame) is layer or _called(frame) is layer for frame in inside)


class _CallOrRun:
    """The forward of a layer, which calls it where it is not called. users: the runs that it is there for, of which
    several may halt and go on by turns; before: what was there."""

    def __init__(self, layer: nn.Module, before: Callable[..., Any] | None) -> None:
        self._layer, self.before, self.users = layer, before, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _runs(self._layer, list(_frames())):
            return self._layer(*args, **kwargs)
        return type(self._layer).forward(self._layer, *args, **kwargs) if self.before is None else \
            self.before(*args, **kwargs)


class Handle:
    """A module whose code calls layers, until `remove`."""

    def __init__(self, module: nn.Module, uses: Uses) -> None:
        self._module = module
        vars(module)[_MARK] = uses
        for name in uses.without_bias:
            vars(module.get_submodule(name))[_UNREAD] = True
        module.__class__ = _calling(type(module))

    def remove(self) -> None:
        """Let its code run as it is."""
        put_back(self._module)

    def make_permanent(self) -> None:
        """Let the module be what it is now for good."""

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


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
            yield Handle(own, _noted[module])


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


def _bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_FUNCTIONS[func][1], args, strict=False)), **kwargs}


def _does_the_same(layer: nn.Module, func: Any, given: Mapping[str, Any]) -> bool:
    """Whether a function of a layer's weight computes what the layer does."""
    kind, names = _FUNCTIONS[func]
    plain: Any = next((base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules.")), None)
    if not isinstance(layer, kind) or plain is None or type(layer).forward is not plain.forward or \
            getattr(type(layer), "_conv_forward", None) is not getattr(plain, "_conv_forward", None):
        return False
    held = {**layer._parameters, **layer._buffers}
    if not isinstance(given.get("input"), Tensor) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return all(given.get(name) is held.get(name) for name in names if name in _TENSORS) and \
        _has_settings(layer, given) and getattr(layer, "max_norm", None) is given.get("max_norm") is None


def _has_settings(layer: nn.Module, given: Mapping[str, Any]) -> bool:
    names = next(names for kind, names in _FUNCTIONS.values() if isinstance(layer, kind))
    known = [name for name in names if name not in (*_TENSORS, *_NO_MATTER, "max_norm")]
    return all(_alike(given.get(name, _DEFAULTS.get(name)), getattr(layer, name)) for name in known)


def _alike(given: Any, own: Any) -> bool:
    """Whether a number, or several, are those of a layer."""
    if isinstance(own, tuple) and not isinstance(given, str):
        given = (given,) * len(own) if isinstance(given, int) else tuple(given)
        given = given * len(own) if len(given) == 1 else given
    return bool(given == own)


def _frames() -> Iterator[FrameType]:
    """From who has called a function, outwards."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """What the first argument of the code of a frame is."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _called(frame: FrameType) -> nn.Module | None:
    """The module that is called by a frame of PyTorch's; None of any other."""
    return frame.f_locals["self"] if frame.f_code is nn.Module._call_impl.__code__ else None


def _runs(layer: nn.Module, frames: list[FrameType]) -> bool:
    """Whether the innermost module that is called is the layer."""
    return next(filter(None, map(_called, frames)), None) is layer

