"""Layers of a class of a user's own, made of no layer of PyTorch, that compute what one does: a nn.Linear (`x @
self.w.t() + self.b`, F.linear, an einsum, with a weight that lies either way) or a convolution (F.conv2d).

In evaluation copies, and in a model that pruning returns where it loses something, such a layer is that of PyTorch: see
fastscore.modules.weights.computed_weights.
"""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.modules.copying import is_setting, own_attributes

_LEADING = ((3,), (2, 3), (2, 2, 3))  # of inputs that it is tried on: as many dimensions as its code takes
_FAR = 100.0
_PLAIN = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, torch.jit.ScriptModule)  # known by other means
_OTHERS = ("torch", "transformers", "fastscore")  # whose layers are known so, too
_CONVOLUTIONS: Mapping[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d, F.conv_transpose3d: nn.ConvTranspose3d}
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OF_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_NAMED = {function: (*ARGUMENTS[:3], *_OF_TRANSPOSED) if issubclass(kind, nn.modules.conv._ConvTransposeNd)
          else ARGUMENTS for function, kind in _CONVOLUTIONS.items()}


@dataclass(frozen=True)
class OwnLayer:
    """What one is: the names of its parameters; whether the weight of a Linear is [inputs, outputs]; the layer of
    PyTorch that computes the same, and the settings of a convolution."""

    weight: str
    bias: str | None
    transposed: bool = False
    kind: type[nn.Module] = nn.Linear
    settings: tuple[tuple[str, Any], ...] = ()

    def made(self, weight: Tensor, bias: bool) -> nn.Module:
        """That layer, without numbers. weight: as it has it."""
        if self.kind is nn.Linear:
            return nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
        settings = dict(self.settings)
        first, second = weight.shape[0], weight.shape[1] * settings.get("groups", 1)
        widths = (first, second) if issubclass(self.kind, nn.modules.conv._ConvTransposeNd) else (second, first)
        return self.kind(*widths, tuple(weight.shape[2:]), bias=bias, device="meta", **settings)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What it makes of x. weight, bias: as PyTorch's layer has them."""
        function = next((function for function, kind in _CONVOLUTIONS.items() if kind is self.kind), F.linear)
        made: Tensor = function(x, weight, bias, **dict(self.settings))
        return made


_alike: "weakref.WeakKeyDictionary[type, dict[Any, OwnLayer | None]]" = weakref.WeakKeyDictionary()
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, OwnLayer | None]]" = weakref.WeakKeyDictionary()


def own_layer(module: nn.Module) -> OwnLayer | None:
    """What such a layer is; None of any other module.

    A copy runs by itself, in evaluation and training mode, on inputs and with parameters of its own, and must make of
    them what F.linear does, or a convolution, with the gradient that it has. The module is not run.
    """
    if module._modules or module._buffers or type(module).__module__.partition(".")[0] in _OTHERS or \
            isinstance(module, _PLAIN) or "forward" in vars(module):
        return None
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    of_dims = {min(parameter.dim(), 2): name for name, parameter in parameters.items()}  # of a bias, and a weight
    if set(of_dims) not in ({2}, {1, 2}) or len(of_dims) < len(parameters) or \
            not all(parameter.is_floating_point() for parameter in parameters.values()):
        return None
    key = tuple((name, parameter.shape) for name, parameter in parameters.items()), type(module)
    if module not in _found or _found[module][0] != key:
        _found[module] = key, _of_its_like(module, key[0], of_dims)
    return _found[module][1]


def weight_of(module: nn.Module, own: OwnLayer) -> Tensor:
    """Its weight as PyTorch's layer has it, in the same memory."""
    weight = module.get_parameter(own.weight).detach()
    return weight.t() if own.transposed else weight


def inputs_of(module: nn.Module, own: OwnLayer) -> int:
    """How many channels it reads."""
    made: Any = own.made(weight_of(module, own), False)
    return int(made.in_features if own.kind is nn.Linear else made.in_channels)


def become_layer(module: nn.Module, own: OwnLayer, weight: Tensor) -> None:
    """Make it PyTorch's layer of that weight, in place."""
    learns = module.get_parameter(own.weight).requires_grad
    bias = None if own.bias is None else module._parameters[own.bias]
    made = own.made(weight, bias is not None)
    module._parameters.clear()
    for name in ("weight", "bias"):
        vars(module).pop(name, None)
    vars(module).update(own_attributes(made))
    module.__class__ = own.kind
    module._parameters.update(weight=nn.Parameter(weight.detach(), learns), bias=bias)


def _of_its_like(module: nn.Module, shapes: Any, of_dims: dict[int, str]) -> OwnLayer | None:
    """The same, tried once for all modules of a class that hold equal numbers and words: copies of one, mostly."""
    own = own_attributes(module)
    if not all(map(is_setting, own.values())):
        return _probed(module, of_dims[2], of_dims.get(1))
    known = _alike.setdefault(type(module), {})
    key = shapes, repr(sorted(own.items()))
    if key not in known:
        known[key] = _probed(module, of_dims[2], of_dims.get(1))
    return known[key]


def _probed(module: nn.Module, weight: str, bias: str | None) -> OwnLayer | None:
    shapes = {name: module.get_parameter(name).shape for name in (weight, bias) if name is not None}
    if len(shapes[weight]) > 2:
        return _convolution(module, weight, bias, shapes)
    for transposed in (False, True):
        outputs, inputs = reversed(shapes[weight]) if transposed else shapes[weight]
        if bias is None or shapes[bias] == (outputs,):
            for leading in _LEADING:
                if all(_computes(module, OwnLayer(weight, bias, transposed), shapes, (*leading, inputs), seed)
                       for seed in (0, 1)):
                    return OwnLayer(weight, bias, transposed)
    return None


def _convolution(module: nn.Module, weight: str, bias: str | None, shapes: dict[str, torch.Size]
                 ) -> OwnLayer | None:
    """The same of a module whose weight is that of a convolution, of which it runs one."""
    outputs, inputs, *kernel = shapes[weight]
    numbers = [value for value in vars(module).values() if type(value) is int and 0 < value <= outputs]  # of groups
    for width in dict.fromkeys((inputs, outputs, *(inputs * number for number in numbers))):
        sizes = [(2, width, *(4 * size + 3 + 3 * seed for size in kernel)) for seed in (0, 1)]
        alone, held = _alone(module, shapes, lambda shape: torch.empty(shape, device="meta"))
        with torch.no_grad(), suppress(Exception), Calls(_NAMED) as calls:  # of what takes something else
            type(alone).forward(alone, torch.empty(sizes[0], device="meta"))
        if len(calls.made) != 1 or calls.made[0][1].get("weight") is not held[weight]:
            continue
        function, given, _ = calls.made[0]
        settings = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given.items()
                         if name in _OF_TRANSPOSED)
        own = OwnLayer(weight, bias, kind=_CONVOLUTIONS[function], settings=settings)
        if all(_computes(module, own, shapes, size, seed) for seed, size in enumerate(sizes)):
            return own
    return None


class Calls(TorchFunctionMode):
    """Notes the calls in the block of functions, whose arguments have these names: (function, arguments by name, what
    came of it)."""

    def __init__(self, functions: Mapping[Any, Sequence[str]]) -> None:
        super().__init__()
        self._functions = functions
        self.made: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (names := self._functions.get(func)) is not None:
            self.made.append((func, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, output))
        return output


def _alone(module: nn.Module, shapes: dict[str, torch.Size], made: Callable[[torch.Size], Tensor]
           ) -> tuple[nn.Module, dict[str, Any]]:
    """A copy in evaluation mode, and its parameters, which are made for it."""
    alone = copy.copy(module)  # what its code counts or keeps is not for the user's layer
    held: dict[str, Any] = {name: nn.Parameter(made(shape)) for name, shape in shapes.items()}
    alone.training, alone._parameters = False, {**dict.fromkeys(module._parameters), **held}
    return alone, held


@torch.inference_mode(False)
def _computes(module: nn.Module, own: OwnLayer, shapes: dict[str, torch.Size], size: tuple[int, ...], seed: int
              ) -> bool:
    """Whether it makes of random parameters and inputs what PyTorch's layer does, and its gradient."""
    random = torch.Generator().manual_seed(seed)
    alone, held = _alone(module, shapes, lambda shape: torch.randn(shape, generator=random, dtype=torch.float64))
    alone.training = bool(seed)  # what it does in training alone, as dropout, would be lost
    x = torch.randn(size, generator=random, dtype=torch.float64) * (_FAR if seed else 1)
    x.requires_grad_()
    weight = held[own.weight].t() if own.transposed else held[own.weight]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):  # of what takes something else
        made, expected = type(alone).forward(alone, x), own(x, weight, held.get(own.bias or ""))
        if not isinstance(made, Tensor) or made.shape != expected.shape or made.dtype != expected.dtype:
            return False
        sent = torch.randn(made.shape, generator=random, dtype=torch.float64)
        read = [x, *held.values()]
        first, second = ((y, *torch.autograd.grad(y, read, sent)) for y in (made, expected))
        return all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(first, second, strict=True))
    return False
